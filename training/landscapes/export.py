"""Join a UNet folder and an autoencoder into one float16 diffusers folder and draw the sheet.
export.py UNET_DIR VAE_DIR OUT [--sheet FILE] [--steps 25] [--guidance 4.0] [--seed 0]"""
import argparse, json, os, shutil, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from diffusers import StableDiffusionXLPipeline

PROMPTS = [
    "a sunset over the sea with a boat and a sun", "the sea at night with a boat and a moon", "a day over the sea with clouds and birds", "sunrise over the sea with a sun",
    "mountains at sunrise with a red house", "mountains at night with a moon on the left", "mountains at day with clouds and a sun on the right", "green hills at day with trees and clouds",
    "hills at sunset with houses and a sun", "a desert at day with cactus and a sun", "a desert at sunset with cactus", "a forest at day with a sun on the left",
    "a city at night with a moon", "a city at sunset with birds", "a red heart on a white background", "a yellow star left of a blue circle on a black background"]
ap = argparse.ArgumentParser()
ap.add_argument("unet"); ap.add_argument("vae"); ap.add_argument("out"); ap.add_argument("--tok", default="tok")
ap.add_argument("--sheet"); ap.add_argument("--steps", type=int, default=25); ap.add_argument("--guidance", type=float, default=4.0); ap.add_argument("--seed", type=int, default=0)
a = ap.parse_args()
torch.set_num_threads(1)
shutil.rmtree(a.out, ignore_errors=True)
shutil.copytree(a.unet, a.out)
shutil.rmtree(f"{a.out}/vae"); shutil.copytree(a.vae, f"{a.out}/vae")
for root, _, files in os.walk(a.out):
    for f in files:
        p = os.path.join(root, f)
        if f.endswith(".safetensors"):
            w = load_file(p)
            if "text_encoder" in root:   # the hub's key names
                w = {k if k.startswith(("text_model.", "text_projection")) else "text_model." + k: v for k, v in w.items()}
            save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in w.items()}, p, metadata={"format": "pt"})
        elif f.endswith("config.json") or f == "model_index.json":
            c = json.load(open(p)); c.pop("_name_or_path", None)
            if "dtype" in c: c["dtype"] = "float16"
            json.dump(c, open(p, "w"), indent=2, ensure_ascii=True)
for t in ("tokenizer", "tokenizer_2"):
    for f in ("vocab.json", "merges.txt"): shutil.copy(f"{a.tok}/{f}", f"{a.out}/{t}/{f}")
    j = json.load(open(f"{a.tok}/vocab.json")); json.dump(j, open(f"{a.out}/{t}/vocab.json", "w"), separators=(",", ":"))
    j = json.load(open(f"{a.out}/{t}/tokenizer.json")); json.dump(j, open(f"{a.out}/{t}/tokenizer.json", "w"), separators=(",", ":"))
for r_, _, fs in os.walk(a.out):
    for f in fs: os.chmod(os.path.join(r_, f), 0o644)
print("bytes", sum(os.path.getsize(os.path.join(r, f)) for r, _, fs in os.walk(a.out) for f in fs if not f.endswith(".md")))
if a.sheet:
    pipe = StableDiffusionXLPipeline.from_pretrained(a.out, torch_dtype=torch.float16).to(dtype=torch.float32)   # float16 values, float32 arithmetic: float16 is slow on a CPU
    pipe.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (4 * 128, 4 * 128))
    for i, prompt in enumerate(PROMPTS):
        im = pipe(prompt, num_inference_steps=a.steps, guidance_scale=a.guidance, height=128, width=128, generator=torch.Generator().manual_seed(a.seed + i)).images[0]
        sheet.paste(im, (i % 4 * 128, i // 4 * 128))
    sheet.save(a.sheet)
    open(os.path.splitext(a.sheet)[0] + "-prompts.txt", "w").write("\n".join(PROMPTS) + "\n")
