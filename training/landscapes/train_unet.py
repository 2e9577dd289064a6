"""Train the UNet and both text encoders together.  train_unet.py OUT MINUTES --vae DIR [--init DIR] [--lr LR]"""
import argparse, signal, json, math, os, random, time
import numpy as np, torch
from diffusers import AutoencoderKL, UNet2DConditionModel, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTextConfig, CLIPTokenizer
from optim import Optimizer
from scenes import sample

ap = argparse.ArgumentParser()
ap.add_argument("out"); ap.add_argument("minutes", type=float)
ap.add_argument("--vae", default="vae"); ap.add_argument("--tok", default="tok"); ap.add_argument("--init")
ap.add_argument("--lr", type=float, default=1.5e-3); ap.add_argument("--final-frac", type=float, default=0.03); ap.add_argument("--warm", type=int, default=50)
ap.add_argument("--batch", type=int, default=64); ap.add_argument("--seed", type=int, default=1)
ap.add_argument("--pool", type=int, default=24000); ap.add_argument("--start-pool", type=int, default=3000); ap.add_argument("--fresh", type=int, default=8)
ap.add_argument("--sheet", action="store_true", help="draw eight prompts at every save"); ap.add_argument("--save-every", type=float, default=10); ap.add_argument("--ema", type=float, default=0.998)
a = ap.parse_args()
torch.set_num_threads(1); torch.manual_seed(a.seed); r = random.Random(a.seed)
vae = AutoencoderKL.from_pretrained(a.vae).float().eval().requires_grad_(False)
sf = vae.config.scaling_factor
V = len(json.load(open(f"{a.tok}/vocab.json"))); bos, eos = V - 2, V - 1
tok1 = CLIPTokenizer.from_pretrained(a.tok, model_max_length=77, pad_token="<|endoftext|>")
tok2 = CLIPTokenizer.from_pretrained(a.tok, model_max_length=77, pad_token="!")

def text_cfg(act):
    return CLIPTextConfig(vocab_size=V, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=64, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, hidden_act=act)

if a.init:
    unet = UNet2DConditionModel.from_pretrained(f"{a.init}/unet").float()
    te1 = CLIPTextModel.from_pretrained(f"{a.init}/text_encoder").float()
    te2 = CLIPTextModelWithProjection.from_pretrained(f"{a.init}/text_encoder_2").float()
else:
    unet = UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 112), layers_per_block=1, transformer_layers_per_block=[1, 1, 1], attention_head_dim=[2, 4, 4],
        cross_attention_dim=128, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=64 + 6 * 32, norm_num_groups=16)
    te1 = CLIPTextModel(text_cfg("quick_gelu")); te2 = CLIPTextModelWithProjection(text_cfg("gelu"))
for m in (te1, te2): m.set_attn_implementation("eager")
sdpa = unet.attn_processors
unet.set_attn_processor(AttnProcessor())      # explicit attention: its backward pass is much faster on a CPU
models = {"unet": unet, "text_encoder": te1, "text_encoder_2": te2}
for n, m in models.items(): m.train(); print(n, sum(p.numel() for p in m.parameters()))
opt = Optimizer(models.values())
avg = {k: {n: v.clone() for n, v in m.state_dict().items()} for k, m in models.items()}

# A rolling pool of encoded pictures: fresh ones all the time, batches drawn from all.
pool = torch.zeros(a.pool, 8, 16, 16); ids1 = torch.zeros(a.pool, 77, dtype=torch.long); ids2 = ids1.clone(); filled = ptr = 0

@torch.no_grad()
def add(k):
    global filled, ptr
    xs, cs = zip(*[sample(r) for _ in range(k)]); cs = list(cs)
    x = torch.from_numpy(np.stack(xs)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d = vae.encode(x).latent_dist
    at = torch.arange(ptr, ptr + k) % a.pool
    pool[at] = torch.cat([d.mean.float(), d.std.float()], 1)
    for t, ids in ((tok1, ids1), (tok2, ids2)):
        ids[at] = t(cs, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    ptr = (ptr + k) % a.pool; filled = min(a.pool, filled + k)

t0 = time.time()
while filled < a.start_pool: add(32)
print(f"pool {filled} after {time.time()-t0:.0f}s; latent std {(pool[:filled,:4]*sf).std().item():.3f}", flush=True)
betas = torch.linspace(0.00085 ** .5, 0.012 ** .5, 1000, dtype=torch.float64) ** 2
acp = torch.cumprod(1 - betas, 0).float()
time_ids = torch.tensor([[128., 128., 0., 0., 128., 128.]]).expand(a.batch, -1)
test = ["a sunset over the sea with a boat and a sun", "night over a city, a moon", "mountains at sunrise with a red house", "a forest at day with clouds and a sun on the left",
        "a desert at sunset with cactus", "green hills at day with a tree and clouds", "a red heart on a white background", "a blue star left of a yellow circle on a black background"]

def save():
    live = {k: {n: v.clone() for n, v in m.state_dict().items()} for k, m in models.items()}
    for k, m in models.items(): m.load_state_dict(avg[k]); m.eval()
    unet.set_attn_processor(dict(sdpa))
    sch = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, timestep_spacing="leading", steps_offset=1)
    pipe = StableDiffusionXLPipeline(vae=vae, text_encoder=te1, text_encoder_2=te2, tokenizer=tok1, tokenizer_2=tok2, unet=unet, scheduler=sch, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(a.out + ".tmp"); os.system(f"rm -rf {a.out}.old; mv {a.out} {a.out}.old 2>/dev/null; mv {a.out}.tmp {a.out}")
    if a.sheet:
      ims = pipe(test, num_inference_steps=20, guidance_scale=4.0, height=128, width=128, generator=torch.Generator().manual_seed(0)).images
      from PIL import Image
      sheet = Image.new("RGB", (512, 256))
      for i, im in enumerate(ims): sheet.paste(im, (i % 4 * 128, i // 4 * 128))
      sheet.save(a.out + ".png")
    unet.set_attn_processor(AttnProcessor())
    for k, m in models.items(): m.load_state_dict(live[k]); m.train()

stop = []; signal.signal(signal.SIGTERM, lambda *_: stop.append(1))     # save and leave
t0 = last = time.time(); step = 0; run = None; c0 = time.process_time()
while (frac := (time.time() - t0) / (a.minutes * 60)) < 1 and not stop:
    lr = a.lr * min(1, (step + 1) / a.warm) * (0.5 * (1 + math.cos(math.pi * frac)) * (1 - a.final_frac) + a.final_frac)
    if a.fresh: add(a.fresh)
    i = torch.randint(0, filled, (a.batch,)); mom = pool[i]
    z = (mom[:, :4] + mom[:, 4:] * torch.randn(a.batch, 4, 16, 16)) * sf
    t = ((torch.arange(a.batch) + torch.rand(a.batch)) * (1000 / a.batch)).long().clamp(max=999)    # stratified
    eps = torch.randn_like(z); s = acp[t][:, None, None, None]
    keep = (torch.rand(a.batch) >= .1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h1 = te1(ids1[i], output_hidden_states=True).hidden_states[-2]
        o2 = te2(ids2[i], output_hidden_states=True)
        e = torch.cat([h1, o2.hidden_states[-2]], -1) * keep[:, None, None]
        out = unet(s.sqrt() * z + (1 - s).sqrt() * eps, t, encoder_hidden_states=e,
            added_cond_kwargs={"text_embeds": o2.text_embeds * keep[:, None], "time_ids": time_ids}, return_dict=False)[0]
    snr = (s / (1 - s)).flatten()
    l = ((out.float() - eps) ** 2).mean((1, 2, 3)); loss = (l * snr.clamp(max=5) / snr).mean()
    loss.backward(); opt.step(lr); step += 1
    if step % 2 == 0:
        k = min(a.ema, (1 + step) / (10 + step)) ** 2
        with torch.no_grad():
            for n, m in models.items():
                sd = m.state_dict(); keys = [q for q in sd if sd[q].is_floating_point()]
                torch._foreach_lerp_([avg[n][q] for q in keys], [sd[q] for q in keys], 1 - k)
    run = l.mean().item() if run is None else run * .98 + l.mean().item() * .02
    if step % 50 == 0:
        print(step, f"{time.time()-t0:.0f}s cpu {time.process_time()-c0:.0f}s loss {run:.4f} lr {lr:.1e} {step*a.batch/(time.time()-t0):.0f} pic/s wall {step*a.batch/(time.process_time()-c0):.0f} pic/s cpu", flush=True)
    if time.time() - last > a.save_every * 60: save(); last = time.time()
save()
