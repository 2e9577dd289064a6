"""Prints the numbers of `crates/dw-pipelines/tests/stable_diffusion_3.rs`.

    python3 tests/parity/make_sd3.py

Needs torch 2.15, diffusers 0.42 and transformers 5. The models are the tiny ones that the tests build from seeds
(`crates/dw-pipelines/tests/support/tiny.rs`), evaluated in float32 on a CPU.
"""

import hashlib

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from transformers import T5Config, T5EncoderModel

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
)
TABLES = ("shared.weight", "relative_attention_bias.weight")


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(tag, model):
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{tag}/{name}".encode()).digest()
        value = drawn(int.from_bytes(digest[:4], "little"), *parameter.shape)
        if name.endswith(TABLES):
            value = value * 0.6
        elif value.ndim > 1:
            value = value / value[0].numel() ** 0.5
        elif name.endswith(".bias"):
            value = value * 0.1
        elif "norm" in name:
            value = value * 0.15 + 1
        else:
            value = value * 0.3
        parameter.data.copy_(value)
    return model.eval()


def show(name, tensor):
    flat = tensor.flatten()
    picked = [flat[i * (len(flat) - 1) // 5].item() for i in range(6)]
    numbers = ", ".join(f"{value:.6f}" for value in picked)
    print(f"{name} {list(tensor.shape)}: [{numbers}], mean size {flat.abs().mean().item():.6f}")


@torch.no_grad()
def main():
    t5 = T5Config(
        vocab_size=480, d_model=80, d_kv=8, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    ids = torch.arange(300).reshape(2, 150) % 460
    show("t5", seeded("sd35/t5", T5EncoderModel(t5))(ids)[0])

    inputs = dict(
        hidden_states=drawn(1, 2, 16, 8, 12),
        encoder_hidden_states=drawn(2, 2, 45, 80),
        pooled_projections=drawn(3, 2, 64),
        timestep=torch.tensor([601.5, 601.5]),
        return_dict=False,
    )
    residuals = [drawn(4, 2, 24, 32), drawn(5, 2, 24, 32)]
    dual = dict(TRANSFORMER, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    transformer = seeded("sd35/tr", SD3Transformer2DModel(**dual))
    show("3.5 medium", transformer(**inputs)[0])
    show("with a block left out", transformer(**inputs, skip_layers=[1])[0])
    show("with residuals", transformer(**inputs, block_controlnet_hidden_states=residuals)[0])
    show("3.5 large", seeded("sd35/large", SD3Transformer2DModel(**TRANSFORMER, qk_norm="rms_norm"))(**inputs)[0])
    show("3 medium", seeded("sd3/medium", SD3Transformer2DModel(**TRANSFORMER))(**inputs)[0])

    net = dict(TRANSFORMER, num_layers=2, use_pos_embed=False, pos_embed_type=None)
    inputs["hidden_states"] = transformer.pos_embed(inputs["hidden_states"])
    inputs.update(controlnet_cond=drawn(6, 2, 16, 8, 12), conditioning_scale=0.7)
    joint = seeded("sd35/cn", SD3ControlNetModel(**net, qk_norm="rms_norm"))
    for i, residual in enumerate(joint(**inputs)[0]):
        show(f"controlnet {i}", residual)
    inputs["encoder_hidden_states"] = None
    alone = seeded("sd35/cn-large", SD3ControlNetModel(**dict(net, joint_attention_dim=None)))
    for i, residual in enumerate(alone(**inputs)[0]):
        show(f"controlnet without text {i}", residual)


main()
