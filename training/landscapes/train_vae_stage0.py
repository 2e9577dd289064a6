"""First stage of the autoencoder, plain AdamW.  T=1 train_vae_stage0.py MINUTES [resume]   (reads and writes vae/)"""
import random, time, sys, math, os
import numpy as np, torch, torch.nn.functional as F
from diffusers import AutoencoderKL
from scenes import sample
torch.set_num_threads(int(os.environ.get("T", "1")))
MIN = float(sys.argv[1]); out = "vae"
torch.manual_seed(0)
vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, sample_size=128,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=(20, 32, 48, 64), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0, mid_block_add_attention=False)
if len(sys.argv) > 2: vae = AutoencoderKL.from_pretrained(out)
print("params", sum(p.numel() for p in vae.parameters()) / 1e6)
vae = vae.to(memory_format=torch.channels_last)
opt = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(.9, .99), weight_decay=1e-4)
B = 12
r = random.Random(int(time.time()))
t0 = time.time(); step = 0; ema = None
avg = {k: v.detach().clone() for k, v in vae.state_dict().items()}
def batch():
    xs = []
    for _ in range(B // 3):
        a = sample(r)[0]
        for _ in range(3):
            i, j = r.randrange(0, 65, 8), r.randrange(0, 65, 8)
            xs.append(a[i:i + 64, j:j + 64])
    xs = np.stack(xs)
    return torch.from_numpy(xs).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
while True:
    frac = (time.time() - t0) / (MIN * 60)
    if frac >= 1: break
    lr = float(os.environ.get("LR", "2e-3")) * min(1, step / 100) * (0.5 * (1 + math.cos(math.pi * frac)) * .98 + .02)
    for g in opt.param_groups: g["lr"] = lr
    x = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dist = vae.encode(x).latent_dist
        z = dist.mean + torch.randn_like(dist.mean) * torch.exp(0.5 * dist.logvar.clamp(-30, 4))
        y = vae.decode(z).sample
    y = y.float()
    m, lv = dist.mean.float(), dist.logvar.float().clamp(-30, 4)
    kl = 0.5 * (m ** 2 + lv.exp() - 1 - lv).mean()
    rec = F.l1_loss(y, x) + F.mse_loss(y, x)
    gx = F.l1_loss(y[..., 1:] - y[..., :-1], x[..., 1:] - x[..., :-1]) + F.l1_loss(y[..., 1:, :] - y[..., :-1, :], x[..., 1:, :] - x[..., :-1, :])
    loss = rec + 0.5 * gx + 2e-4 * kl
    opt.zero_grad(); loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    opt.step(); step += 1
    for k, v in vae.state_dict().items(): avg[k].lerp_(v, 0.005 if step > 200 else 0.1)
    if step % 50 == 0:
        print(step, f"{time.time()-t0:.0f}s loss {loss.item():.4f} rec {rec.item():.4f} kl {kl.item():.3f} {step*B/(time.time()-t0):.1f} img/s", flush=True)
vae.load_state_dict(avg)
vae.eval()
with torch.no_grad():
    zs = torch.cat([vae.encode(batch()).latent_dist.mode() for _ in range(8)])
    s = 1 / zs.std().item(); print("scale", s, "mean", zs.mean().item())
    vae.register_to_config(scaling_factor=s)
    x = torch.from_numpy(np.stack([sample(r)[0] for _ in range(8)])).permute(0,3,1,2).float().div(127.5).sub(1); y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    img = torch.cat([torch.cat(list(x[:8]), 2), torch.cat(list(y[:8]), 2)], 1)
    from PIL import Image
    Image.fromarray(((img.permute(1, 2, 0) + 1) * 127.5).byte().numpy()).save("vae.png")
vae.save_pretrained(out)
