"""Train the autoencoder.  train_vae.py OUT MINUTES [--init DIR] [--decoder-only] [--lr LR] [--noise S]"""
import argparse, signal, math, os, random, time
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from diffusers import AutoencoderKL
from optim import Optimizer
from scenes import sample

ap = argparse.ArgumentParser()
ap.add_argument("out"); ap.add_argument("minutes", type=float)
ap.add_argument("--init"); ap.add_argument("--decoder-only", action="store_true")
ap.add_argument("--lr", type=float, default=1e-3); ap.add_argument("--kl", type=float, default=1e-3)
ap.add_argument("--noise", type=float, default=0.06, help="extra latent noise, in units of the scaled latent")
ap.add_argument("--batch", type=int, default=12); ap.add_argument("--size", type=int, default=64, help="crop size; 128 = whole pictures"); ap.add_argument("--seed", type=int, default=1); ap.add_argument("--ema", type=float, default=0.998)
ap.add_argument("--final-frac", type=float, default=0.05); ap.add_argument("--warm", type=int, default=50)
a = ap.parse_args()
torch.set_num_threads(1); torch.manual_seed(a.seed); r = random.Random(a.seed)
if a.init:
    vae = AutoencoderKL.from_pretrained(a.init).float()
else:
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, sample_size=128, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=(20, 32, 48, 64), layers_per_block=1, norm_num_groups=4,
        scaling_factor=1.0, mid_block_add_attention=False)
sf = vae.config.scaling_factor
if a.decoder_only:
    vae.encoder.requires_grad_(False); vae.quant_conv.requires_grad_(False)
opt = Optimizer([vae], weight_decay=1e-3)
avg = {k: v.clone() for k, v in vae.state_dict().items()}

def pictures(n):
    return torch.from_numpy(np.stack([sample(r)[0] for _ in range(n)])).permute(0, 3, 1, 2).float().div(127.5).sub(1)

reserve = []
def crops(n, size):
    """Aligned crops, three of each fresh picture."""
    while len(reserve) < (96 if size < 128 else n):
        p = pictures(1)[0]
        for _ in range(3 if size < 128 else 1):
            i, j = r.randrange(0, 129 - size, 8), r.randrange(0, 129 - size, 8)
            c = p[:, i:i + size, j:j + size]
            reserve.append(c.flip(-1) if r.random() < .5 else c)
    random.Random(r.random()).shuffle(reserve)
    return torch.stack([reserve.pop() for _ in range(n)])

def edges(x):
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

def loss_fn(y, x):
    rec = F.l1_loss(y, x) + F.mse_loss(y, x)
    l = rec
    for k in range(3):          # edges at three scales
        l = l + (0.6, 0.3, 0.2)[k] * sum(F.l1_loss(p, q) for p, q in zip(edges(y), edges(x)))
        if k < 2: y, x = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)
    return l, rec

test_r = random.Random(123)
def save():
    live = {k: v.clone() for k, v in vae.state_dict().items()}
    vae.load_state_dict(avg); vae.eval()
    rr = random.Random(123)
    x = torch.from_numpy(np.stack([sample(rr)[0] for _ in range(32)])).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    with torch.no_grad():
        m = vae.encode(x).latent_dist.mean
        y = vae.decode(m).sample.clamp(-1, 1)
        print(f"save: std {m.std().item():.3f} per channel {[round(v, 2) for v in m.std((0, 2, 3)).tolist()]} test L1 {F.l1_loss(y, x).item():.4f} mse {F.mse_loss(y, x).item():.5f}", flush=True)
        if not a.decoder_only: vae.register_to_config(scaling_factor=round(1 / m.std().item(), 4))
    img = torch.cat([torch.cat([torch.cat(list(x[i:i + 8]), 2), torch.cat(list(y[i:i + 8]), 2)], 1) for i in (0, 8, 16)], 1)
    Image.fromarray(((img.permute(1, 2, 0) + 1) * 127.5).byte().numpy()).save(a.out + ".png")
    vae.save_pretrained(a.out + ".tmp"); os.system(f"rm -rf {a.out}.old; mv {a.out} {a.out}.old 2>/dev/null; mv {a.out}.tmp {a.out}")
    vae.load_state_dict(live); vae.train()

stop = []; signal.signal(signal.SIGTERM, lambda *_: stop.append(1))     # save and leave
t0 = time.time(); last = t0; step = 0; run = None
while (frac := (time.time() - t0) / (a.minutes * 60)) < 1 and not stop:
    lr = a.lr * min(1, (step + 1) / a.warm) * (0.5 * (1 + math.cos(math.pi * frac)) * (1 - a.final_frac) + a.final_frac)
    x = crops(a.batch, a.size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.set_grad_enabled(not a.decoder_only):
            d = vae.encode(x).latent_dist
        extra = torch.rand(a.batch, 1, 1, 1) * a.noise / sf
        z = d.mean + torch.randn_like(d.mean) * (d.std ** 2 + extra ** 2).sqrt()
        y = vae.decode(z, return_dict=False)[0]
    loss, rec = loss_fn(y.float(), x)
    if not a.decoder_only:
        m, lv = d.mean.float(), d.logvar.float()
        loss = loss + a.kl * 0.5 * (m ** 2 + lv.exp() - 1 - lv).mean()
    loss.backward(); opt.step(lr); step += 1
    with torch.no_grad():
        k = min(a.ema, (1 + step) / (10 + step))
        for n, v in vae.state_dict().items(): avg[n].lerp_(v, 1 - k)
    run = rec.item() if run is None else run * .98 + rec.item() * .02
    if step % 100 == 0:
        print(step, f"{time.time()-t0:.0f}s cpu {time.process_time():.0f}s loss {loss.item():.4f} rec {run:.4f} lr {lr:.1e} {step*a.batch/(time.time()-t0):.1f} crop/s", flush=True)
    if time.time() - last > 300: last = time.time(); save()
save()
