"""Writes expected.safetensors: what Pillow and OpenCV make of the pictures in this folder.

pip install pillow==13.0.0 numpy==2.4.6 opencv-python-headless==5.0.0.*; python make.py
"""

import json
import struct
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
FILTERS = {
    "nearest": Image.NEAREST,
    "box": Image.BOX,
    "bilinear": Image.BILINEAR,
    "bicubic": Image.BICUBIC,
    "lanczos": Image.LANCZOS,
}


def alpha_picture():
    """A small RGBA picture whose alpha takes every value, 0 and 255 among them."""
    y, x = np.mgrid[0:24, 0:33]
    planes = [x * 7 % 256, y * 11 % 256, (x * y * 5) % 256, (x * 9 + y * 13) % 256]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8), "RGBA")


def noise_picture():
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (47, 61, 3), dtype=np.uint8), "RGB")


def resized(arrays, name, picture, sizes):
    for width, height in sizes:
        for filter_name, resample in FILTERS.items():
            out = np.asarray(picture.resize((width, height), resample))
            arrays[f"{name}.{width}x{height}.{filter_name}"] = out


def edges(arrays, name, picture):
    for low, high in [(100, 200), (20, 60), (200, 100), (50.5, 400.25)]:
        arrays[f"{name}.canny.{low}.{high}"] = cv2.Canny(np.asarray(picture), low, high)


def write(path, arrays):
    header, offset = {}, 0
    for name, array in arrays.items():
        shape, size = list(array.shape), array.nbytes
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def main():
    arrays = {}
    for name in ["photo_75x53", "scene_128x128", "mask_64x64"]:
        picture = Image.open(HERE / f"{name}.png").convert("RGB")
        resized(arrays, name, picture, [(64, 64), (96, 40), (24, 32)])
        edges(arrays, name, picture)
    photo = Image.open(HERE / "photo_75x53.png").convert("RGB")
    resized(arrays, "photo_75x53", photo, [(75, 20), (20, 53), (1, 1)])
    grey = photo.convert("L")
    arrays["grey.luma"] = np.asarray(grey)
    resized(arrays, "grey", grey, [(96, 40), (24, 32)])
    edges(arrays, "grey", grey)
    alpha = alpha_picture()
    arrays["alpha"] = np.asarray(alpha)
    resized(arrays, "alpha", alpha, [(50, 40), (12, 9), (30, 9)])
    noise = noise_picture()
    arrays["noise"] = np.asarray(noise)
    edges(arrays, "noise", noise)
    write(HERE / "expected.safetensors", arrays)


if __name__ == "__main__":
    main()
