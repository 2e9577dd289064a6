"""Rebuilds the parity fixtures of this folder from a reference run.

    python3 tests/parity/make.py REFERENCE

REFERENCE holds `models/<name>/` (tiny random models in the diffusers layout) and `cases/<name>/tensors.safetensors`
(the tensors that HuggingFace diffusers computed with them, in float32 on a CPU). Needs nothing but Python 3.
"""

import json
import pathlib
import shutil
import struct
import sys

HERE = pathlib.Path(__file__).resolve().parent

MODELS = ["sd15", "sdxl"]

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

# Which tensors of which case the component tests compare.
COMPONENTS = {
    "sd15_i2i": TEXT + DENOISER + DECODER + ENCODER,
    "sd15_t2i_clip_skip": TEXT,
    "sdxl_i2i": TEXT + DENOISER + DECODER + ENCODER,
    "sdxl_t2i_96x64": TEXT + DENOISER + DECODER,
}


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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
