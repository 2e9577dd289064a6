"""Rebuilds `variants/`: tiny models with settings that the published models of `models/` do not use.

    python3 tests/parity/make_variants.py

Needs torch 2.15, diffusers 0.42 and transformers 5. Each folder holds a model as the library saves it, and
`case.safetensors` with inputs and outputs of one evaluation in float32 on a CPU.
"""

import hashlib
import pathlib
import shutil

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

HERE = pathlib.Path(__file__).resolve().parent / "variants"

BASE = dict(
    sample_size=8,
    block_out_channels=(4, 8),
    norm_num_groups=2,
    cross_attention_dim=12,
    attention_head_dim=2,
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)

UNETS = {
    # A distilled model's guidance embedding, other sinusoids, latents that do not halve evenly.
    "unet-guided": dict(
        BASE,
        time_cond_proj_dim=6,
        flip_sin_to_cos=False,
        freq_shift=1,
        time_embedding_dim=20,
        timestep_post_act="silu",
        time_embedding_act_fn="gelu",
        mid_block_scale_factor=1.4,
        conv_in_kernel=1,
        conv_out_kernel=1,
    ),
    # Class numbers, times that scale and shift, attention to the text alone, a middle without attention.
    "unet-classes": dict(
        BASE,
        num_class_embeds=5,
        resnet_time_scale_shift="scale_shift",
        only_cross_attention=(True, False),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=(1, 2),
        cross_attention_dim=(12, 12),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=((2,), 1),
        reverse_transformer_layers_per_block=(1, (0, 2)),
        downsample_padding=0,
    ),
    # Attention between pixels, appended class features, no middle, centred input.
    "unet-pixels": dict(
        BASE,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("AttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(4, 2),
        class_embed_type="projection",
        projection_class_embeddings_input_dim=7,
        class_embeddings_concat=True,
        mid_block_type=None,
        center_input_sample=True,
        use_linear_projection=True,
        act_fn="mish",
    ),
    "unet-class-times": dict(BASE, class_embed_type="timestep"),
    "unet-class-features": dict(
        BASE, class_embed_type="simple_projection", projection_class_embeddings_input_dim=7
    ),
}


def randomize(model):
    """Fills every parameter from its own seed, so that no term is zero."""
    for name, parameter in model.named_parameters():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        if parameter.dim() > 1:
            noise = noise / parameter[0].numel() ** 0.5
        else:
            noise = 0.15 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.data.copy_(noise)
    return model.eval()


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def class_labels(config):
    if config.num_class_embeds is not None:
        return torch.tensor([3.0, 0.0])
    if config.class_embed_type == "timestep":
        return torch.tensor([20.0, 350.0])
    if config.class_embed_type is not None:
        return noise(4, 2, 7)
    return None


def make_unet(name, settings):
    model = randomize(UNet2DConditionModel(**settings))
    size = (7, 5) if name == "unet-guided" else (8, 6)
    case = {"sample": noise(1, 2, 4, *size), "text": noise(2, 2, 9, 12)}
    labels = class_labels(model.config)
    if labels is not None:
        case["class_labels"] = labels
    if model.config.time_cond_proj_dim is not None:
        case["timestep_cond"] = noise(3, 2, 6)
    given = None if labels is None else (labels.long() if model.config.num_class_embeds else labels)
    case["out"] = model(
        case["sample"],
        421.0,
        case["text"],
        class_labels=given,
        timestep_cond=case.get("timestep_cond"),
        return_dict=False,
    )[0]
    save(name, model, case)


def make_vae():
    """The sixteen channels of later models, without the 1x1 convolutions, and a picture of odd size."""
    model = randomize(
        AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=16,
            norm_num_groups=2,
            sample_size=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )
    picture, latents = noise(1, 1, 3, 17, 22), noise(2, 1, 16, 5, 4)
    posterior = model.encode(picture).latent_dist
    case = {"picture": picture, "mean": posterior.mean, "logvar": posterior.logvar, "latents": latents}
    case["out"] = model.decode(latents, return_dict=False)[0]
    save("vae-16", model, case)


def make_clip():
    """A text encoder as transformers 5 saves it: an end token with its real number."""
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        hidden_act="gelu",
        bos_token_id=57,
        eos_token_id=58,
        pad_token_id=58,
    )
    model = randomize(CLIPTextModelWithProjection(config))
    # The largest number is no end token.
    ids = torch.tensor([[57, 4, 59, 8, 58, 58, 58], [57, 59, 58, 58, 58, 58, 58]])
    out = model(ids, output_hidden_states=True)
    case = {"ids": ids, "out": out.text_embeds, "last": out.last_hidden_state}
    save("clip-end", model, case)


def make_ip_adapters():
    """A plus and a full IP-Adapter on one UNet, in the layout of their files; two pictures, scales 0.7 and 0.3."""
    unet = randomize(UNet2DConditionModel(**BASE))
    plus = {
        "latents": noise(10, 1, 3, 64),
        "proj_in.weight": noise(11, 64, 10) / 3,
        "proj_in.bias": noise(12, 64) / 5,
        "proj_out.weight": noise(13, 12, 64) / 8,
        "proj_out.bias": noise(14, 12) / 5,
        "norm_out.weight": 1 + noise(15, 12) / 5,
        "norm_out.bias": noise(16, 12) / 5,
    }
    for layer in range(4):
        for i, (key, shape) in enumerate(
            [
                ("0.norm1.weight", (64,)),
                ("0.norm1.bias", (64,)),
                ("0.norm2.weight", (64,)),
                ("0.norm2.bias", (64,)),
                ("0.to_q.weight", (64, 64)),
                ("0.to_kv.weight", (128, 64)),
                ("0.to_out.weight", (64, 64)),
                ("1.0.weight", (64,)),
                ("1.0.bias", (64,)),
                ("1.1.weight", (256, 64)),
                ("1.3.weight", (64, 256)),
            ]
        ):
            value = noise(20 + 20 * layer + i, *shape)
            plus[f"layers.{layer}.{key}"] = value / shape[-1] ** 0.5 if len(shape) > 1 else 1 + value / 5
    full = {
        "proj.0.weight": noise(70, 10, 10) / 3,
        "proj.0.bias": noise(71, 10) / 5,
        "proj.2.weight": noise(72, 12, 10) / 3,
        "proj.2.bias": noise(73, 12) / 5,
        "proj.3.weight": 1 + noise(74, 12) / 5,
        "proj.3.bias": noise(75, 12) / 5,
    }
    widths = [p.hidden_size for p in ip_layers(unet)]
    features = noise(5, 2, 2, 6, 10)
    case = {"sample": noise(1, 2, 4, 8, 6), "text": noise(2, 2, 9, 12), "features": features}
    states = []
    for at, projection in enumerate([plus, full]):
        keys = {}
        for i, width in enumerate(widths):
            for j, part in enumerate(["to_k_ip", "to_v_ip"]):
                keys[f"{2 * i + 1}.{part}.weight"] = noise(100 + 50 * at + 2 * i + j, width, 12) / 3
        # Stored in half precision, and computed with exactly those numbers.
        groups = {"image_proj": projection, "ip_adapter": keys}
        tensors = {f"{group}.{key}": value.half() for group, values in groups.items() for key, value in values.items()}
        states.append({group: {key: value.half().float() for key, value in values.items()} for group, values in groups.items()})
        (HERE / "ip-adapters").mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "ip-adapters" / f"{['plus', 'full'][at]}.safetensors")
    unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7, 0.3]
    case["out"] = unet(
        case["sample"],
        421.0,
        case["text"],
        added_cond_kwargs={"image_embeds": [features, features]},
        return_dict=False,
    )[0]
    plain = randomize(UNet2DConditionModel(**BASE))
    save("ip-adapters/unet", plain, case)


def ip_layers(unet):
    """The attention layers that look at the text, as the library orders them, with their width."""
    from types import SimpleNamespace

    return [
        SimpleNamespace(hidden_size=unet.get_submodule(name.removesuffix(".processor")).to_q.out_features)
        for name in unet.attn_processors
        if "attn2" in name
    ]


def save(name, model, case):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    save_file({key: value.detach().contiguous() for key, value in case.items()}, folder / "case.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        for name, settings in UNETS.items():
            make_unet(name, settings)
        make_vae()
        make_clip()
        make_ip_adapters()
