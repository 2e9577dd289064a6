"""Prints the numbers of `crates/dw-pipelines/tests/sd3_ip_adapter.rs`.

    python3 tests/parity/make_sd3_ip_adapter.py

Needs torch 2.15, diffusers 0.42 and transformers 5. The models are the tiny ones that the test builds from seeds
(`crates/dw-pipelines/tests/support/tiny.rs`), run in float32 on a CPU.
"""

import hashlib
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

INPUTS = Path(__file__).parent / "inputs"
TABLES = ("position_embedding.weight",)
TRANSFORMER = dict(
    sample_size=8,
    patch_size=2,
    in_channels=16,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=80,
    caption_projection_dim=32,
    pooled_projection_dim=64,
    out_channels=16,
    pos_embed_max_size=24,
    qk_norm="rms_norm",
    dual_attention_layers=(0, 1),
)
SIGLIP = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    vision_use_head=False,
)
VAE = dict(
    block_out_channels=(8, 16, 16, 16),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    latent_channels=16,
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(tag, name, shape):
    digest = hashlib.sha256(f"{tag}/{name}".encode()).digest()
    value = drawn(int.from_bytes(digest[:4], "little"), *shape)
    if name.endswith(TABLES):
        return value * 0.6
    if value.ndim > 1:
        return value / value[0].numel() ** 0.5
    if name.endswith(".bias"):
        return value * 0.1
    return value * 0.15 + 1 if "norm" in name else value * 0.3


def seeded(tag, model):
    for name, tensor in model.named_parameters():
        tensor.data.copy_(parameter(tag, name.removeprefix("vision_model."), tensor.shape))
    return model.eval()


def adapter():
    """Names and shapes as `InstantX/SD3.5-Large-IP-Adapter` has them."""
    inner, width, hidden, features, times = 32, 48, 24, 128, 16
    shapes = {
        "image_proj.latents": (1, 5, hidden),
        "image_proj.time_embedding.linear_1.weight": (hidden, times),
        "image_proj.time_embedding.linear_1.bias": (hidden,),
        "image_proj.time_embedding.linear_2.weight": (hidden, hidden),
        "image_proj.time_embedding.linear_2.bias": (hidden,),
        "image_proj.proj_in.weight": (hidden, width),
        "image_proj.proj_in.bias": (hidden,),
        "image_proj.proj_out.weight": (inner, hidden),
        "image_proj.proj_out.bias": (inner,),
        "image_proj.norm_out.weight": (inner,),
        "image_proj.norm_out.bias": (inner,),
    }
    for i in range(4):
        layer = f"image_proj.layers.{i}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"{layer}.{norm}.weight": (hidden,), f"{layer}.{norm}.bias": (hidden,)}
        shapes |= {
            f"{layer}.0.to_q.weight": (features, hidden),
            f"{layer}.0.to_kv.weight": (2 * features, hidden),
            f"{layer}.0.to_out.weight": (hidden, features),
            f"{layer}.1.1.weight": (4 * hidden, hidden),
            f"{layer}.1.3.weight": (hidden, 4 * hidden),
            f"{layer}.2.1.weight": (4 * hidden, hidden),
            f"{layer}.2.1.bias": (4 * hidden,),
        }
    for i in range(5):
        layer = f"ip_adapter.{i}"
        shapes |= {
            f"{layer}.norm_ip.linear.weight": (2 * inner, hidden),
            f"{layer}.norm_ip.linear.bias": (2 * inner,),
            f"{layer}.to_k_ip.weight": (inner, inner),
            f"{layer}.to_v_ip.weight": (inner, inner),
        }
        shapes |= {f"{layer}.{norm}.weight": (8,) for norm in ("norm_q", "norm_k", "norm_ip_k")}
    return {name: parameter("sd35/ip", name, shape) for name, shape in shapes.items()}


def autoencoder():
    vae = seeded("sd35/vae", AutoencoderKL(**VAE))
    weight, bias = vae.encoder.conv_out.weight.data, vae.encoder.conv_out.bias.data
    weight[16:] *= 0.3
    bias[:16] += 0.0609
    bias[16:] -= 1.5
    return vae


def show(name, tensor):
    flat = tensor.flatten()
    picked = [flat[i * (len(flat) - 1) // 15].item() for i in range(16)]
    print(f"{name} {list(tensor.shape)}: [{', '.join(f'{value:.6f}' for value in picked)}]")


def pipeline(kind):
    pipe = kind(
        transformer=seeded("sd35/tr", SD3Transformer2DModel(**TRANSFORMER)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=seeded("sd35/siglip", SiglipVisionModel(SiglipVisionConfig(**SIGLIP))),
        feature_extractor=SiglipImageProcessorPil(size=dict(height=32, width=32)),
    )
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        save_file(adapter(), Path(folder) / "ip-adapter.safetensors")
        pipe.load_ip_adapter(folder, weight_name="ip-adapter.safetensors")
    return pipe


def call(pipe, scale, **more):
    pipe.set_ip_adapter_scale(scale)
    arguments = dict(
        prompt_embeds=drawn(11, 1, 20, 80),
        pooled_prompt_embeds=drawn(12, 1, 64),
        negative_prompt_embeds=drawn(13, 1, 20, 80),
        negative_pooled_prompt_embeds=drawn(14, 1, 64),
        guidance_scale=4.0,
        num_inference_steps=4,
        height=64,
        width=96,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    )
    return pipe(**(arguments | more)).images


@torch.no_grad()
def main():
    scene = Image.open(INPUTS / "scene_64x64.png").convert("RGB")
    other = Image.open(INPUTS / "edges_64x64.png").convert("RGB")
    pipe = pipeline(StableDiffusion3Pipeline)
    show("scale 1", call(pipe, 1.0, ip_adapter_image=scene))
    show("scale 0.5", call(pipe, 0.5, ip_adapter_image=scene))
    show("none", call(pipe, 0.0, ip_adapter_image=scene))
    skipped = dict(skip_guidance_layers=[0], skip_layer_guidance_stop=0.9)
    show("skipped layers", call(pipe, 1.0, ip_adapter_image=scene, **skipped))
    show("embeds", call(pipe, 0.7, ip_adapter_image_embeds=drawn(15, 2, 16, 48)))
    show("unguided, two pictures", call(pipe, 1.0, ip_adapter_image=[scene, other], guidance_scale=1.0))
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    shapes = ((2, 20, 80), (2, 64)) * 2
    two = {name: drawn(seed, *shape) for name, seed, shape in zip(names, range(21, 25), shapes)}
    show("two prompts", call(pipe, 1.0, ip_adapter_image=scene, **two))
    pipe = pipeline(StableDiffusion3Img2ImgPipeline)
    show("image to image", call(pipe, 1.0, ip_adapter_image=other, image=scene, strength=0.6, width=64))


if __name__ == "__main__":
    main()
