#!/usr/bin/env python3
"""Packs reference runs of samplers and random generators into the fixtures of the tests.

    make_schedulers.py SOURCE

SOURCE holds `schedulers/NAME.json` and `schedulers/NAME.safetensors` (trajectories that HuggingFace diffusers
0.42.1 with torch 2.15.0 recorded on a CPU, in float32, with fixed random model outputs), `rng/cpu.safetensors`
(draws of torch's CPU generator) and `rng/cuda_philox.safetensors` (draws of its CUDA generator).

Writes, beside this file, `schedulers/NAME.safetensors` with what describes the run in the metadata key `run`, and
`rng/*.safetensors` with a selection of the draws. Needs nothing but Python.
"""

import json
import pathlib
import struct
import sys

HERE = pathlib.Path(__file__).parent
SAMPLER_KEYS = ("class", "config", "num_inference_steps", "set_timesteps_kwargs", "step_kwargs", "begin_index", "order")


def read(path):
    """The tensors of a safetensors file: name -> (dtype, shape, bytes)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {name: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])]) for name, t in header.items()}


def write(path, tensors, metadata=None):
    """Writes a safetensors file, the widest types first so that every tensor is aligned."""
    width = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}
    header, body = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda item: (-width[item[1][0]], item[0])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def plain(value):
    """JSON without Python's spelling of infinity."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def pack_schedulers(source):
    tables = set()
    for path in sorted((source / "schedulers").glob("*.json")):
        run = json.loads(path.read_text())
        tensors = read(path.with_suffix(".safetensors"))
        # One copy of each training schedule is enough.
        if tensors.get("alphas_cumprod", (0, 0, 0))[2] in tables:
            del tensors["alphas_cumprod"]
        elif "alphas_cumprod" in tensors:
            tables.add(tensors["alphas_cumprod"][2])
        # Draws of a Brownian tree come from generators of its own.
        if run["class"] == "DPMSolverSDEScheduler":
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("noise.rng.")}
        kept = plain({key: run[key] for key in SAMPLER_KEYS})
        metadata = {"run": json.dumps(kept, separators=(",", ":"))}
        write(HERE / "schedulers" / f"{path.stem}.safetensors", tensors, metadata)


def pack_rng(source):
    seeds = ("seed0.", "seed42.", "seed4294967301.")
    lengths = ("n1", "n7", "n15", "n16", "n17", "n31", "n33", "n40", "n1000")
    cpu = {}
    for name, tensor in read(source / "rng" / "cpu.safetensors").items():
        part = name.split(".")
        draw = len(part) == 3 and part[1] in ("f32", "f64", "f16", "bf16")
        if name.startswith(seeds) and (part[2] in lengths if draw else "torch26" not in name):
            cpu[name] = tensor
    write(HERE / "rng" / "cpu.safetensors", cpu)
    cuda = {}
    for name, tensor in read(source / "rng" / "cuda_philox.safetensors").items():
        if name.startswith(("seed0.", "seed4294967301.")) and len(tensor[2]) <= 40000:
            cuda[name] = tensor
    write(HERE / "rng" / "cuda_philox.safetensors", cuda)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pack_schedulers(pathlib.Path(sys.argv[1]))
    pack_rng(pathlib.Path(sys.argv[1]))
