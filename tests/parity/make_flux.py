"""Prints what HuggingFace diffusers computes with the tiny Flux models, for crates/dw-pipelines/tests/flux/.

The models are made from seeds (crates/dw-pipelines/tests/support/tiny.rs says how), so nothing is stored but the numbers.
usage: make_flux.py      needs torch, diffusers 0.42.1, transformers
"""
import hashlib, itertools, math, re, tempfile
import numpy as np
import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxControlNetPipeline, FluxImg2ImgPipeline,
                       FluxInpaintPipeline, FluxKontextPipeline, FluxMultiControlNetModel, FluxPipeline, FluxTransformer2DModel,
                       UniPCMultistepScheduler)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

torch.set_num_threads(1)
TABLES = ("token_embedding.weight", "position_embedding.weight", "shared.weight", "relative_attention_bias.weight")


def drawn(name, shape):
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(tag, name, shape):
    x = drawn(f"{tag}/{name}", shape)
    if name.endswith(TABLES): return x * 0.6
    if len(shape) == 1: return x * 0.1 if name.endswith(".bias") else (x * 0.15 + 1.0 if "norm" in name else x * 0.3)
    return x * (1.0 / math.sqrt(math.prod(shape[1:])))


def filled(model, tag):
    state = {k: parameter(tag, k, v.shape) for k, v in model.state_dict().items() if "position_ids" not in k}
    if "decoder.conv_in.weight" in state:
        half = state["encoder.conv_out.bias"].shape[0] // 2
        state["decoder.conv_in.weight"] *= 0.3611
        state["decoder.conv_out.weight"] *= 0.35
        state["encoder.conv_out.weight"][:half] *= 0.8 / 0.3611
        state["encoder.conv_out.weight"][half:] *= 0.3
        state["encoder.conv_out.bias"][:half] += 0.1159
        state["encoder.conv_out.bias"][half:] -= 1.5
    model.load_state_dict(state, strict=False)
    return model.eval()


def show(name, x):
    x = x.detach().float().flatten()
    values = list(x[:4]) + list(x[-2:]) + [x.abs().mean()]
    print(name, "[" + ", ".join(f"{float(v):.7f}" for v in values) + "]")


TRANSFORMER = dict(attention_head_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=True, in_channels=64, joint_attention_dim=64,
                   num_attention_heads=2, num_layers=2, num_single_layers=3, pooled_projection_dim=32)
VAE = dict(in_channels=3, out_channels=3, block_out_channels=[8, 16, 16, 16], latent_channels=16, layers_per_block=1, norm_num_groups=4,
           down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.3611, shift_factor=0.1159,
           use_quant_conv=False, use_post_quant_conv=False, force_upcast=True, sample_size=64)

transformer = filled(FluxTransformer2DModel(**TRANSFORMER), "flux/dev")
ids = torch.zeros(6, 3); ids[:, 1] = torch.arange(6) // 3; ids[:, 2] = torch.arange(6) % 3
inputs = dict(hidden_states=drawn("input/picture", (1, 6, 64)), encoder_hidden_states=drawn("input/text", (1, 5, 64)),
              pooled_projections=drawn("input/pooled", (1, 32)), timestep=torch.tensor([0.7]), guidance=torch.tensor([3.5]),
              img_ids=ids, txt_ids=torch.zeros(5, 3))
with torch.no_grad():
    show("transformer", transformer(**inputs).sample)
    config = dict(TRANSFORMER, num_single_layers=1, num_mode=3)
    net = filled(FluxControlNetModel(**config), "flux/union")
    out = net(**inputs, controlnet_cond=drawn("input/condition", (1, 6, 64)), controlnet_mode=torch.tensor([[2]]), conditioning_scale=0.6)
    show("controlnet last block", out.controlnet_block_samples[1])
    show("controlnet single block", out.controlnet_single_block_samples[0])
    show("controlled transformer", transformer(**inputs, controlnet_block_samples=out.controlnet_block_samples,
                                               controlnet_single_block_samples=out.controlnet_single_block_samples).sample)
    siglip = SiglipVisionConfig(hidden_size=48, image_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, patch_size=8)
    siglip = filled(SiglipVisionModel(siglip), "redux/siglip")
    states = siglip(drawn("input/pixels", (1, 3, 32, 32))).last_hidden_state
    show("siglip", states)
    show("redux", filled(ReduxImageEncoder(48, 64), "redux/emb")(states).image_embeds)
    vae = filled(AutoencoderKL(**VAE), "flux/vae")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt_embeds=drawn("input/prompt", (1, 7, 64)), pooled_prompt_embeds=drawn("input/pooled", (1, 32)), height=64, width=80,
                num_inference_steps=3, guidance_scale=3.5)
    latents = pipe(**call, generator=torch.Generator().manual_seed(5), output_type="latent").images
    show("pipeline latents", FluxPipeline._unpack_latents(latents, 64, 80, 8))
    negative = dict(negative_prompt_embeds=drawn("input/negative", (1, 7, 64)), negative_pooled_prompt_embeds=drawn("input/pooled2", (1, 32)))
    latents = pipe(**call, **negative, true_cfg_scale=2.5, generator=torch.Generator().manual_seed(5), output_type="latent").images
    show("guided pipeline latents", FluxPipeline._unpack_latents(latents, 64, 80, 8))


def sixteen(name, x):
    x = x.detach().float().flatten()
    print(name, "[" + ", ".join(f"{float(x[i * x.numel() // 16]):.7f}" for i in range(16)) + "]")


def picture(width, height):
    at = lambda x, y: (x * 3 % 256, y * 5 % 256, 90)
    return Image.fromarray(np.array([[at(x, y) for x in range(width)] for y in range(height)], dtype=np.uint8))


# IP-Adapters, in XLabs' layout.
VISION = CLIPVisionConfig(hidden_size=32, intermediate_size=48, projection_dim=24, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                          patch_size=8)
shapes = {"image_proj.proj.weight": (256, 24), "image_proj.proj.bias": (256,), "image_proj.norm.weight": (64,), "image_proj.norm.bias": (64,)}
for block, layer in itertools.product(range(2), "kv"):
    shapes |= {f"ip_adapter.{block}.to_{layer}_ip.weight": (32, 64), f"ip_adapter.{block}.to_{layer}_ip.bias": (32,)}
adapter = {}
for name, shape in shapes.items():
    xlabs = re.sub(r"ip_adapter\.(\d+)\.to_([kv])_ip", r"double_blocks.\1.processor.ip_adapter_double_stream_\2_proj", name)
    adapter[xlabs.replace("image_proj.", "ip_adapter_proj_model.")] = parameter("flux/ip", name, shape)
seeded = lambda: torch.Generator().manual_seed(5)
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    save_file(adapter, f"{folder}/ip_adapter.safetensors")
    filled(CLIPVisionModelWithProjection(VISION), "flux/clip-vision").save_pretrained(f"{folder}/image_encoder")
    pipe.load_ip_adapter(folder, weight_name="ip_adapter.safetensors", image_encoder_pretrained_model_name_or_path=f"{folder}/image_encoder",
                         image_encoder_dtype=torch.float32)
    shown, unpacked = picture(48, 40), lambda latents: FluxPipeline._unpack_latents(latents, 64, 80, 8)
    run = lambda pipe=pipe, **more: unpacked(pipe(**call, **more, generator=seeded(), output_type="latent").images)
    for scale in (1.0, [0.3, 0.9]):
        pipe.set_ip_adapter_scale(scale)
        sixteen(f"image prompt {scale}", run(ip_adapter_image=shown))
    pipe.set_ip_adapter_scale(0.7)
    guided = dict(negative, true_cfg_scale=2.5)
    sixteen("image prompt guided", run(ip_adapter_image=shown, **guided))
    sixteen("image prompt and negative one", run(ip_adapter_image=shown, negative_ip_adapter_image=picture(40, 64), **guided))
    sixteen("image prompt negative alone", run(negative_ip_adapter_image=picture(40, 64), **guided))
    embeds = dict(ip_adapter_image_embeds=[drawn("input/faces", (1, 2, 24))], negative_ip_adapter_image_embeds=[drawn("input/faces2", (1, 1, 24))])
    sixteen("image prompt embeds", run(**embeds, **guided))
    parts = dict(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
                 image_encoder=pipe.image_encoder, feature_extractor=pipe.feature_extractor)
    whole = Image.new("L", (80, 64), 255)
    net = filled(FluxControlNetModel(**dict(TRANSFORMER, num_single_layers=1)), "flux/cn")
    for name, pipe, more in (
        ("image to image", FluxImg2ImgPipeline(**parts), dict(image=picture(80, 64), strength=0.7)),
        ("inpainting", FluxInpaintPipeline(**parts), dict(image=picture(80, 64), mask_image=whole, strength=0.7)),
        ("Kontext", FluxKontextPipeline(**parts), dict(image=picture(64, 64), _auto_resize=False, max_area=64 * 80)),
        ("ControlNet", FluxControlNetPipeline(**parts, controlnet=net), dict(control_image=picture(80, 64))),
    ):
        pipe.set_progress_bar_config(disable=True)
        show(f"image prompt {name}", run(pipe, ip_adapter_image=shown, **more))

# ControlNets that read pixels, nets of several depths, and a scheduler that could lay the flow out itself.
with torch.no_grad():
    pixels = filled(FluxControlNetModel(**dict(TRANSFORMER, num_single_layers=1, patch_size=2, conditioning_embedding_channels=16)), "flux/hints")
    out = pixels(**inputs, controlnet_cond=drawn("input/hint", (1, 3, 32, 48)), conditioning_scale=0.6)
    show("last block of pixels", out.controlnet_block_samples[1])
    transformer = filled(FluxTransformer2DModel(**TRANSFORMER), "flux/dev")
    shallow = filled(FluxControlNetModel(**dict(TRANSFORMER, num_layers=1, num_single_layers=0)), "flux/shallow")
    nets = FluxControlNetPipeline(scheduler, vae, None, None, None, None, transformer, FluxMultiControlNetModel([net, shallow]))
    pixel = FluxControlNetPipeline(scheduler, vae, None, None, None, None, transformer, pixels)
    flow = UniPCMultistepScheduler.from_config(scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction")
    own = FluxControlNetPipeline(flow, vae, None, None, None, None, transformer, net)
    for name, pipe, more in (
        ("two nets", nets, dict(control_image=[picture(80, 64), picture(40, 64)], controlnet_conditioning_scale=[0.7, 0.5])),
        ("net of pixels", pixel, dict(control_image=picture(70, 50), controlnet_conditioning_scale=0.7)),
        ("net and even noise levels", own, dict(control_image=picture(80, 64))),
    ):
        pipe.set_progress_bar_config(disable=True)
        show(name, run(pipe, **more))
