"""Muon for the matrices (convolutions count as [out, in*k*k]), AdamW for everything else."""
import torch


@torch.no_grad()
def orthogonalize(g, steps=5):
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix; g is a stack [n, rows, cols]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    flip = x.size(-2) > x.size(-1)
    if flip:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if flip else x).float()


class Muon(torch.optim.Optimizer):
    """Update size is matched to Adam's, so that both halves share one learning rate."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                st = self.state[p]
                if "m" not in st:
                    st["m"] = torch.zeros_like(p)
                st["m"].lerp_(p.grad, 1 - group["momentum"])
                u = p.grad.lerp(st["m"], group["momentum"]).reshape(p.shape[0], -1)
                shapes.setdefault(u.shape, []).append((p, u))
            for (rows, cols), items in shapes.items():
                o = orthogonalize(torch.stack([u for _, u in items])) * (0.2 * max(rows, cols) ** 0.5)
                for (p, _), d in zip(items, o):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(d.view_as(p), alpha=-group["lr"])


class Optimizer:
    def __init__(self, modules, weight_decay=0.01, adam_names=("conv_in", "conv_out", "embedding")):
        mats, rest = [], []
        for m in modules:
            for n, p in m.named_parameters():
                if not p.requires_grad:
                    continue
                (mats if p.ndim >= 2 and not any(a in n for a in adam_names) else rest).append(p)
        self.params = mats + rest
        self.muon = Muon(mats, weight_decay=weight_decay)
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)

    def step(self, lr, clip=1.0):
        torch.nn.utils.clip_grad_norm_(self.params, clip, foreach=True)
        for o in (self.muon, self.adam):
            for g in o.param_groups:
                g["lr"] = lr
            o.step()
            o.zero_grad(set_to_none=True)
