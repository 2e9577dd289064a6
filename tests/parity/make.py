"""Rebuilds the parity fixtures of this folder from a reference run.

    python3 tests/parity/make.py REFERENCE

REFERENCE holds `models/<name>/` (tiny random models in the diffusers layout) and `cases/<name>/tensors.safetensors`
(the tensors that HuggingFace diffusers computed with them, in float32 on a CPU) with its `case.json`, and
`extras/tokens.json`, token ids of many texts. Needs nothing but Python 3.
"""

import json
import pathlib
import shutil
import struct
import sys

HERE = pathlib.Path(__file__).resolve().parent

MODELS = [
    "sd15",
    "sd15-controlnet",
    "sdxl",
    "sdxl-refiner",
    "sdxl-controlnet-a",
    "sdxl-controlnet-b",
    "sdxl-controlnet-union",
    "sdxl-ip-adapter",
]

# Files of a model that no test reads: `tokenizer.json` says the same.
LEFT_OUT = {("sdxl", "vocab.json"), ("sdxl", "merges.txt")}

TEXT = [
    "text_encoder.0.input_ids",
    "text_encoder.1.input_ids",
    "text_encoder_2.0.input_ids",
    "text_encoder_2.1.input_ids",
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
]
DENOISER = [
    "denoiser.0.in.sample",
    "denoiser.0.in.timestep",
    "denoiser.0.in.added_cond_kwargs.text_embeds",
    "denoiser.0.in.added_cond_kwargs.time_ids",
    "denoiser.0.out",
]
DECODER = ["vae.decode.0.in", "vae.decode.0.out"]
ENCODER = ["vae.encode.0.in", "vae.encode.0.mean", "vae.encode.0.logvar"]
CONTROLNET = [
    "controlnet.0.in.added_cond_kwargs.text_embeds",
    "controlnet.0.in.added_cond_kwargs.time_ids",
    "controlnet.0.in.control_type",
    "controlnet.0.in.controlnet_cond",
    "controlnet.0.in.controlnet_cond.0",
    "controlnet.0.in.controlnet_cond.1",
    *[f"controlnet.0.out.0.{i}" for i in range(9)],
    "controlnet.0.out.1",
]
IMAGE_ENCODER = [
    "image_encoder.0.pixel_values",
    "image_encoder.0.last_hidden_state",
    "image_encoder.0.image_embeds",
]

# Which tensors of which case the component tests compare.
COMPONENTS = {
    "sd15_i2i": TEXT + DENOISER + DECODER + ENCODER,
    "sd15_t2i_clip_skip": TEXT,
    "sdxl_i2i": TEXT + DENOISER + DECODER + ENCODER,
    "sdxl_t2i_96x64": TEXT + DENOISER + DECODER,
    "sdxl_controlnet": TEXT + DENOISER + CONTROLNET,
    "sdxl_controlnet_guess": TEXT + DENOISER + CONTROLNET,
    "sdxl_controlnet_union_single": TEXT + DENOISER + CONTROLNET,
    "sdxl_controlnet_union_two": TEXT + DENOISER + CONTROLNET,
    "sdxl_ip_adapter": IMAGE_ENCODER,
}

# Whole calls of a pipeline: every case whose name matches.
CALLS = [
    "sd15_t2i_*",
    "sd15_i2i",
    "sdxl_t2i_*",
    "sdxl_guidance_rescale",
    "sdxl_sched_*",
    "sdxl_i2i*",
    "sdxl_refiner_i2i",
    "sdxl_base_refiner_ensemble",
    "sd15_lora_kohya",
    "sdxl_lora_dora",
    "sdxl_lora_fused",
    "sdxl_lora_kohya",
    "sdxl_lora_locon",
    "sdxl_lora_peft",
    "sdxl_lora_scale_kwarg",
    "sdxl_lora_two",
    "sdxl_textual_inversion",
    "sd15_inpaint4",
    "sdxl_inpaint4*",
    "sd15_controlnet",
    "sdxl_controlnet*",
    "sdxl_ip_adapter*",
]

# The pictures that these calls start from.
INPUTS = [
    "scene_64x64.png",
    "scene2_64x64.png",
    "scene_96x64.png",
    "scene_128x128.png",
    "photo_75x53.png",
    "mask_64x64.png",
    "mask_128x128.png",
    "edges_64x64.png",
    "depth_64x64.png",
]

# LoRA and textual inversion files that the calls above use.
ADAPTERS = [
    "sd15_lora_kohya",
    "sdxl_dora_peft",
    "sdxl_locon_kohya_sgm",
    "sdxl_lora_kohya",
    "sdxl_lora_peft",
    "sdxl_ti_clip_g",
    "sdxl_ti_clip_l",
]


def read(path):
    """The tensors of a safetensors file: name -> (dtype, shape, bytes)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {
        name: (info["dtype"], info["shape"], body[slice(*info["data_offsets"])])
        for name, info in header.items()
    }


def write(path, tensors):
    header, body = {}, b""
    for name, (dtype, shape, data) in sorted(tensors.items()):
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def main(reference):
    for model in MODELS:
        for file in sorted((reference / "models" / model).rglob("*")):
            if not file.is_file() or (model, file.name) in LEFT_OUT:
                continue
            target = HERE / "models" / file.relative_to(reference / "models")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for case, wanted in COMPONENTS.items():
        tensors = read(reference / "cases" / case / "tensors.safetensors")
        write(
            HERE / "components" / f"{case}.safetensors",
            {name: tensors[name] for name in wanted if name in tensors},
        )

    (HERE / "inputs").mkdir(exist_ok=True)
    for name in INPUTS:
        shutil.copyfile(reference / "inputs" / name, HERE / "inputs" / name)
    for name in ADAPTERS:
        file = pathlib.Path("models", "adapters", f"{name}.safetensors")
        (HERE / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reference / file, HERE / file)
    for pattern in CALLS:
        for folder in sorted((reference / "cases").glob(pattern)):
            call(folder)
    tokens(reference / "extras" / "tokens.json")


def call(folder):
    """What a call was given, its latents after each step, and its pictures as bytes."""
    # JSON has no infinity; Python writes and reads one all the same.
    given = json.loads((folder / "case.json").read_text(), parse_constant=str)
    kept = {key: given[key] for key in ["load", "call", "seed", "stages"] if key in given}
    # In full: the classes' defaults are not those of the model's own scheduler.
    if "scheduler" in kept.get("load", {}):
        kept["load"]["scheduler"] = given["scheduler_effective"]
    kept["tolerance_max_abs"] = {
        name: value for name, value in given["tolerance_max_abs"].items() if "latents" in name
    }
    target = HERE / "cases" / folder.name
    target.mkdir(parents=True, exist_ok=True)
    (target / "case.json").write_text(json.dumps(kept, indent=1) + "\n")
    tensors = read(folder / "tensors.safetensors")
    slim = {name: tensor for name, tensor in tensors.items() if "latents.step" in name}
    for name in tensors.keys() & {"image", "s1.image"}:
        _, shape, data = tensors[name]
        values = struct.unpack(f"<{len(data) // 4}f", data)
        # round() rounds halves to even, as numpy does.
        slim[name] = ("U8", shape, bytes(round(value * 255) for value in values))
    write(target / "tensors.safetensors", slim)


def tokens(path):
    given = json.loads(path.read_text())
    kept = {
        name: {"model": given[name]["path"], "rows": [[row["text"], row["padded77"]] for row in given[name]["rows"]]}
        for name in ["clip_pad_eos", "clip_pad_bang"]
    }
    (HERE / "tokens.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
