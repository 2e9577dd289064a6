"""Prints the numbers of `crates/dw-pipelines/tests/sd3_controlnet.rs`.

    python3 tests/parity/make_sd3_controlnet.py

Needs torch 2.15, diffusers 0.42 and transformers 5. The models are the tiny ones that the test builds from seeds
(`crates/dw-pipelines/tests/support/tiny.rs`), run in float32 on a CPU. The control pictures are encoded with torch's global
generator, which is put where a fresh process has it.
"""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
)
from make_sd3_ip_adapter import INPUTS, TRANSFORMER, autoencoder, drawn, seeded, show
from PIL import Image

FRESH = 67280421310721
PLAIN = dict(TRANSFORMER, num_layers=2, qk_norm=None, dual_attention_layers=())


def net(name, **more):
    return seeded(f"sd35/{name}", SD3ControlNetModel(**(PLAIN | more)))


def pipeline(kind, nets):
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
        controlnet=nets,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, rows=1, **more):
    torch.manual_seed(FRESH)
    return pipe(
        prompt_embeds=drawn(11, rows, 20, 80),
        pooled_prompt_embeds=drawn(12, rows, 64),
        negative_prompt_embeds=drawn(13, rows, 20, 80),
        negative_pooled_prompt_embeds=drawn(14, rows, 64),
        guidance_scale=4.0,
        num_inference_steps=4,
        height=64,
        width=96,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **more,
    ).images


@torch.no_grad()
def main():
    scene, edges, mask = (
        Image.open(INPUTS / f"{name}_64x64.png").convert("RGB") for name in ("scene", "edges", "mask")
    )
    shallow, deep = net("net-a"), net("net-b", num_layers=3, force_zeros_for_pooled_projection=False)
    for name, nets in (("shallow first", [shallow, deep]), ("deep first", [deep, shallow])):
        pipe = pipeline(StableDiffusion3ControlNetPipeline, nets)
        both = dict(controlnet_conditioning_scale=[0.5, 0.7], control_guidance_start=[0.0, 0.5])
        both |= dict(control_guidance_end=[0.5, 1.0])
        show(name, call(pipe, control_image=[edges, scene], **both))
    # With the deep net first.
    lists = [[edges, scene], [scene, edges]]
    show("lists", call(pipe, rows=2, control_image=lists, controlnet_conditioning_scale=[0.5, 0.7]))
    painter = net("net-c", extra_conditioning_channels=1)
    pipe = pipeline(StableDiffusion3ControlNetInpaintingPipeline, painter)
    show("painted", call(pipe, control_image=scene, control_mask=mask, controlnet_conditioning_scale=0.8))


if __name__ == "__main__":
    main()
