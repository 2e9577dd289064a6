"""Rebuilds `edited.json`: what the reference does with models that are those of `models/` with parts of other sizes.

    python3 tests/parity/make_edited.py [FOLDER]

Needs torch 2.15, diffusers 0.42 and transformers 5. `crates/dw-pipelines/tests/edited.rs` builds the same models: a new
tensor is `randn` of a generator whose seed is the FNV-1a hash of the tensor's name, so only a few of the computed
numbers are stored. With FOLDER, the models are kept there.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
MODELS = HERE / "models"

# How many values of each tensor are kept: as many, evenly spaced.
KEPT = 16


def draw(name, shape, scale):
    """A new tensor; FNV-1a of its name is the seed."""
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x01000193) & 0xFFFFFFFF
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def edit(folder, component, change_config, change_tensors):
    """Changes configuration and tensors of a component in place."""
    file = folder / component / "config.json"
    config = json.loads(file.read_text())
    change_config(config)
    file.write_text(json.dumps(config))
    file = next((folder / component).glob("*.safetensors"))
    save_file(change_tensors(load_file(file)), file)


def copy(name, folder):
    shutil.copytree(MODELS / name, folder)
    return folder


def name_class(folder, name, **more):
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"_class_name": name} | more))


def widen(folder, extra):
    """Lets the UNet read more channels."""

    def tensors(tensors):
        weight = tensors["conv_in.weight"]
        shape = (weight.shape[0], extra, *weight.shape[2:])
        tensors["conv_in.weight"] = torch.cat([weight, draw("conv_in.weight", shape, 0.15)], 1)
        return tensors

    edit(folder, "unet", lambda config: config.update(in_channels=4 + extra), tensors)


def pix2pix(base, folder):
    widen(copy(base, folder), 4)
    xl = "XL" if base == "sdxl" else ""
    name_class(folder, f"StableDiffusion{xl}InstructPix2PixPipeline")


def upscaler(folder):
    """Three levels in the autoencoder, classes in the UNet."""
    widen(copy("sd15", folder), 3)

    def classes(tensors):
        tensors["class_embedding.weight"] = draw("class_embedding.weight", (1000, 32), 0.5)
        return tensors

    def three_levels(tensors):
        kept = {}
        for name, tensor in tensors.items():
            if "encoder.down_blocks.3." in name or "encoder.down_blocks.2.downsamplers" in name:
                continue
            if name.startswith("decoder.up_blocks.0."):
                continue
            if name.startswith("decoder.up_blocks."):
                level = int(name.split(".")[2])
                name = name.replace(f"up_blocks.{level}", f"up_blocks.{level - 1}", 1)
            kept[name] = tensor
        return kept

    def vae_config(config):
        for key in ["block_out_channels", "down_block_types", "up_block_types"]:
            config[key] = config[key][:3]
        config["scaling_factor"] = 0.08333

    edit(folder, "unet", lambda config: config.update(num_class_embeds=1000), classes)
    edit(folder, "vae", vae_config, three_levels)
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02).save_pretrained(
        folder / "low_res_scheduler"
    )
    (folder / "scheduler" / "scheduler_config.json").unlink()
    DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    ).save_pretrained(folder / "scheduler")
    name_class(
        folder,
        "StableDiffusionUpscalePipeline",
        low_res_scheduler=["diffusers", "DDPMScheduler"],
        scheduler=["diffusers", "DDIMScheduler"],
        max_noise_level=350,
    )


LATENT_UPSCALER = dict(
    sample_size=8,
    in_channels=8,
    out_channels=5,
    block_out_channels=[32, 32, 64, 64],
    layers_per_block=2,
    down_block_types=["KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"],
    mid_block_type=None,
    up_block_types=["KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"],
    act_fn="gelu",
    norm_num_groups=None,
    cross_attention_dim=32,
    attention_head_dim=16,
    resnet_time_scale_shift="scale_shift",
    time_embedding_type="fourier",
    timestep_post_act="gelu",
    time_cond_proj_dim=160,
    conv_in_kernel=1,
    conv_out_kernel=1,
)


def latent_upscaler(folder):
    """A UNet of k-diffusion's blocks, all of it drawn."""
    copy("sd15", folder)
    unet = UNet2DConditionModel.from_config(LATENT_UPSCALER)
    tensors = {}
    for name, tensor in unet.state_dict().items():
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 16
        scale = 0.5 if name == "time_proj.weight" else fan_in**-0.5
        tensors[name] = draw(name, tensor.shape, scale)
        if name.endswith("norm_cross.weight"):
            tensors[name] += 1.0
    shutil.rmtree(folder / "unet")
    unet.load_state_dict(tensors)
    unet.save_pretrained(folder / "unet")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="original_sample"
    ).save_pretrained(folder / "scheduler")
    name_class(folder, "StableDiffusionLatentUpscalePipeline", scheduler=["diffusers", "EulerDiscreteScheduler"])


CALLS = {
    "pix2pix": dict(model="pix2pix", seed=501, image="scene_64x64", prompt="make it night", negative_prompt="blue",
                    num_inference_steps=3),
    "pix2pix_plain": dict(model="pix2pix", seed=502, image="photo_75x53", prompt="make it night", guidance_scale=1.0,
                          num_inference_steps=2),
    "pix2pix_two": dict(model="pix2pix", seed=503, image="scene_64x64", prompt="make it night", image_guidance_scale=1.2,
                        num_inference_steps=2, num_images_per_prompt=2),
    "xl_pix2pix": dict(model="xl_pix2pix", seed=504, image="scene_128x128", prompt="a red hill", height=64, width=96,
                       num_inference_steps=3, guidance_rescale=0.5),
    "upscale": dict(model="upscaler", seed=505, image="scene_64x64", crop=[32, 24], prompt="a red hill",
                    noise_level=30, num_inference_steps=3),
    "upscale_odd": dict(model="upscaler", seed=506, image="photo_75x53", crop=[29, 22], prompt="a red hill",
                        guidance_scale=1.0, num_inference_steps=2),
    "latent_upscale": dict(model="latent_upscaler", seed=507, image="scene_64x64", prompt="a red hill",
                           num_inference_steps=3),
    "latent_upscale_plain": dict(model="latent_upscaler", seed=508, image="scene_96x64", prompt="a red hill",
                                 guidance_scale=0.0, num_inference_steps=2),
}


def kept(tensor):
    flat = tensor.flatten().tolist()
    return [round(flat[at * (len(flat) - 1) // (KEPT - 1)], 5) for at in range(KEPT)]


def run(folder, call):
    call = dict(call)
    index = json.loads((folder / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folder, torch_dtype=torch.float32)
    steps = []
    step = pipeline.scheduler.step

    def watched(*args, **kwargs):
        result = step(*args, **kwargs)
        steps.append(kept(result[0] if isinstance(result, tuple) else result.prev_sample))
        return result

    pipeline.scheduler.step = watched
    picture = Image.open(HERE / "inputs" / f"{call.pop('image')}.png").convert("RGB")
    if crop := call.pop("crop", None):
        picture = picture.crop((0, 0, *crop))
    generator = torch.Generator().manual_seed(call.pop("seed"))
    call.pop("model")
    pictures = pipeline(image=picture, generator=generator, output_type="np", **call).images
    size = [pictures.shape[2], pictures.shape[1]]
    levels = kept(torch.from_numpy(pictures) * 255)
    return {"steps": steps, "size": size, "levels": [round(level, 1) for level in levels]}


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        pix2pix("sd15", root / "pix2pix")
        pix2pix("sdxl", root / "xl_pix2pix")
        upscaler(root / "upscaler")
        latent_upscaler(root / "latent_upscaler")
        cases = {name: {"call": call, **run(root / call["model"], call)} for name, call in CALLS.items()}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    (HERE / "edited.json").write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    main()
