"""Bitmaps of annotation tools as run lengths of the whole image, as in docs/data/data-format.md.

Every size is checked before anything of it is made: a few bytes can claim 10^9 pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from groundkern.trainer.data.images import MAX_PIXELS
from groundkern.trainer.data.run_lengths import encoded

Size = tuple[int, int]  # width, height


def checked_size(width: Any, height: Any) -> Size:
    """An image's size as a mask needs it.

    Raises:
        ValueError: not whole numbers above 0, or more pixels than an image may have.
    """
    if not all(type(side) is int and side > 0 for side in (width, height)):
        raise ValueError(f"expected the image's width and height, got {width!r} x {height!r:.40}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {width} x {height}")
    return width, height


def pasted(bitmap: np.ndarray, left: int, top: int, size: Size) -> dict[str, Any]:
    """Run lengths of an image of a size with a bitmap at (left, top), cut at the edges.

    Raises:
        ValueError: nothing of it is in the image.
    """
    width, height = checked_size(*size)
    whole = np.zeros((height, width), bool)
    rows = slice(max(0, top), max(0, top + bitmap.shape[0]))
    columns = slice(max(0, left), max(0, left + bitmap.shape[1]))
    part = whole[rows, columns]
    y, x = max(0, -top), max(0, -left)
    part |= bitmap[y : y + part.shape[0], x : x + part.shape[1]] != 0
    if not part.any():
        raise ValueError(f"expected a mask with pixels within {width} x {height}, got none")
    return encoded(whole)


def from_png(text: Any, size: Size) -> np.ndarray:
    """The bitmap [height, width] of a base64 PNG that must have a size.

    Raises:
        ValueError: not base64, not a PNG, or of another size.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected a PNG in base64, got {text!r:.40}")
    try:
        data = base64.b64decode(text, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size == size:
            return np.asarray(image.convert("L")) != 0
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"expected base64 ({error})") from None
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise ValueError(f"expected a PNG ({error})") from None
    got = "{} x {}".format(*image.size)
    raise ValueError(f"expected a PNG of {size[0]} x {size[1]}, got {got}")


def from_rows(counts: list[int], size: Size) -> np.ndarray:
    """The bitmap [height, width] of lengths of runs along the rows, 0 first (CVAT).

    Raises:
        ValueError: they do not add up to the size.
    """
    width, height = checked_size(*size)
    if sum(counts) != width * height or min(counts, default=0) < 0:
        raise ValueError(f"expected runs of {width} x {height} pixels, got {sum(counts)}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(height, width)


def from_brush(data: Any, size: Size) -> np.ndarray:
    """The bitmap [height, width] of Label Studio's brush: its bytes are the run lengths of an RGBA
    image, of which the alpha is the mask.

    A head of 32 bits says how many values follow, 5 bits how long a value is (less 1), 4 x 4 bits
    how long a length is (less 1). Then a bit (1: one value repeated, 0: as many values), 2 bits
    (which length), the length less 1, and the value or values.

    Raises:
        ValueError: not bytes, of another size, or cut off.

    Source: github.com/thi-ng/umbrella, packages/rle-pack; label_studio_converter/brush.py.
    """
    width, height = checked_size(*size)
    total = width * height * 4
    if not isinstance(data, list) or not all(type(b) is int and 0 <= b < 256 for b in data):
        raise ValueError(f"expected a list of bytes as `rle`, got {data!r:.40}")
    bits = _Bits(bytes(data))
    if bits.take(32) != total:
        raise ValueError(f"expected {total} values of {width} x {height} pixels as `rle`")
    word = bits.take(5) + 1
    lengths = [bits.take(4) + 1 for _ in range(4)]
    alpha = np.zeros(width * height, bool)
    at = 0
    while at < total:
        repeated, kind = bits.take(1), bits.take(2)
        stop = at + 1 + bits.take(lengths[kind])
        if stop > total:
            raise ValueError(f"expected {total} values as `rle`, got more")
        if repeated:
            alpha[at // 4 : stop // 4] = bits.take(word) != 0  # all i with at <= 4 i + 3 < stop
        else:
            for i in range(at, stop):
                value = bits.take(word)
                if i % 4 == 3:
                    alpha[i // 4] = value != 0
        at = stop
    return alpha.reshape(height, width)


class _Bits:
    """Reads numbers of some bits, the highest first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> int:
        start, stop = self._at, self._at + count
        if stop > 8 * len(self._data):
            raise ValueError("expected more bytes as `rle`: it is cut off")
        self._at = stop
        value = int.from_bytes(self._data[start // 8 : (stop + 7) // 8], "big")
        return value >> -stop % 8 & (1 << count) - 1
