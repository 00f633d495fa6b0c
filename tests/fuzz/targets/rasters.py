"""Files of masks and heats, damaged: their pixels are sound, or they are refused in a sentence."""

from __future__ import annotations

import io
from contextlib import suppress
from functools import cache

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as tensors

from groundkern.rasters import Raster
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.rasters import RasterField, find_heat, find_mask
from tests.fuzz.scratch import folder, written
from tests.fuzz.target import Target, expect

SIZE = (24, 16)  # of the image that they cover
MOST = 1 << 20


@cache
def _files() -> dict[str, bytes]:
    labels = np.arange(24 * 16, dtype=np.uint8).reshape(16, 24) % 5
    found = {}
    for mode in ("1", "L", "P", "RGB", "LA", "RGBA"):
        found[f"{mode}.png"] = _saved(Image.fromarray(labels * 60).convert(mode))
    found["I16.png"] = _saved(Image.fromarray(labels.astype(np.uint16) * 9000))
    for name, values in (
        ("bytes", labels),
        ("floats", labels / 4),
        ("columns", np.asfortranarray(labels.astype(">f4"))),
        ("square", np.eye(5, dtype=np.float16)),
    ):
        buffer = io.BytesIO()
        np.save(buffer, values)
        found[f"{name}.npy"] = buffer.getvalue()
    film = np.stack([labels, labels * 2, labels * 0]).astype(np.float32)
    for save, more in ((np.savez, {"times": np.arange(3.0)}), (np.savez_compressed, {})):
        buffer = io.BytesIO()
        save(buffer, heat=film if more else labels, **more)
        found[f"{save.__name__}.npz"] = buffer.getvalue()
    for name, more in (("film", {"times": torch.arange(3)}), ("plane", {})):
        heat = torch.tensor(film if more else labels).half()
        found[f"{name}.safetensors"] = tensors({"heat": heat, **more})
    return found


def _saved(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def check_raster(data: bytes) -> bool:
    """What is taken is a plane of no more pixels than are allowed, with something inside."""
    name = f"r{_suffix(data)}"
    written(f"rasters/{name}", data)
    field = RasterField(SIZE, folder() / "rasters", MOST, "x:1", "regions[0].heat", timed=True)
    if name != "r.png":
        found = find_heat(name, field).load({})
        rasters = [(0.0, found)] if isinstance(found, Raster) else found
        for _, raster in rasters:
            if raster is not None:
                _sound(raster.values)
        times = [time for time, _ in rasters]
        expect(times == sorted(set(times)) and times[0] >= 0, "times that ascend", times)
        return True
    _sound(find_mask(name, None, field).load({}).values)
    with suppress(SampleError):  # no grey
        _sound(find_heat(name, field).load({}).values)
    return True


def _suffix(data: bytes) -> str:
    if data.startswith(b"\x93NUMPY"):
        return ".npy"
    if data.startswith(b"PK"):
        return ".npz"
    return ".safetensors" if data[8:9] == b"{" else ".png"


def _sound(values: torch.Tensor) -> None:
    expect(0 < values.numel() <= MOST and values.dim() == 2, "a plane", values.shape)
    expect(bool(torch.isfinite(values).all()) and 0 < float(values.max()) <= 1, "values up to 1")


TARGETS = (Target("raster", check_raster, _files(), "bytes"),)
