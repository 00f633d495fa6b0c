"""Images: every format that Pillow writes, damaged; a header that lies must not decide anything."""

from __future__ import annotations

import io
from functools import cache
from importlib.util import find_spec

from PIL import Image, features

from groundkern.hf.data.pictures import ORIENTATION
from groundkern.trainer.data.file_kinds import HEAD, kind_of
from groundkern.trainer.data.images import SampleError, confined, image_size, load_rgb
from groundkern.trainer.prepare.adapt.common import Options, embedded
from groundkern.trainer.prepare.documents import Page, page_frames, page_image
from groundkern.trainer.prepare.sources import Item
from tests.fuzz.scratch import folder, written
from tests.fuzz.target import Target, expect
from tests.trainer.prepare.papers import pdf, with_picture

MOST = 1 << 20  # pixels


@cache
def _pictures() -> dict[str, bytes]:
    color = Image.effect_mandelbrot((24, 16), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    formats = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS")
    found = {f"rgb.{name.lower()}": _encoded(color, name) for name in formats}
    for name, feature in (("WEBP", "webp"), ("JPEG2000", "jpg_2000"), ("AVIF", "avif")):
        if features.check(feature):
            found[f"rgb.{name.lower()}"] = _encoded(color, name)
    found["turned.jpg"] = _encoded(color, "JPEG", exif=exif, progressive=True)
    found["turned.png"] = _encoded(color, "PNG", exif=exif)
    gray = color.convert("L")
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        found[f"{mode.replace(';', '')}.png"] = _encoded(gray.convert(mode), "PNG")
    for image, mode in ((gray, "I"), (gray, "F"), (color, "CMYK"), (color, "YCbCr")):
        found[f"{mode}.tiff"] = _encoded(image.convert(mode), "TIFF")
    if features.check("libtiff"):
        found["lzw.tiff"] = _encoded(color, "TIFF", compression="tiff_lzw")
    found["two.gif"] = _encoded(color, "GIF", save_all=True, append_images=[color.rotate(90)])
    return found


def _in_tables() -> dict[str, bytes]:
    """Those of the formats that are taken from a table."""
    kinds = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tiff")
    return {name: data for name, data in _pictures().items() if name.endswith(kinds)}


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def check_image(data: bytes) -> bool:
    """The header's size is what decoding gives, or the image is refused."""
    written("pictures/p.img", data)
    path = confined("pictures/p.img", folder(), where="x:1", field="images[0]")
    size = image_size(path, max_pixels=MOST, where="x:1", field="images[0]")
    expect(all(type(side) is int and side > 0 for side in size), "a size", size)
    expect(size[0] * size[1] <= MOST, f"at most {MOST} pixels", size)
    image = load_rgb(path, size, where="x:1", field="images[0]")
    expect(image.mode == "RGB" and image.size == size, f"RGB of {size}", image)
    return True


def check_embedded(data: bytes) -> bool:
    """An image that came inside a row of a table: what is found is what is written."""
    item = Item(3, "rows[3]", {})
    found = embedded({"image": {"bytes": data}}, item, Options(folder(), folder="made"))
    path = written(found.path, data)
    size = image_size(path, max_pixels=1 << 40, where="x:1", field="images[0]")
    expect(size == found.size, "the size of the file written", size, found.size)
    return True


def check_pages(data: bytes) -> bool:
    """Every page of a document is an RGB image of bounded size, or refused."""
    file = written("pictures/p.doc", data)
    kind = "PDF" if kind_of(data[:HEAD]) == "PDF" else "TIFF"
    for number, frame in enumerate(page_frames(file, kind, where="x:1")[:3], start=1):
        image = page_image(Page(file, kind, number, frame, ""), 20, where="x:1")
        expect(image.mode == "RGB" and min(image.size) > 0, "an RGB image", image)
    return True


def _documents() -> dict[str, bytes]:
    found = {"two.tiff": _encoded(Image.new("RGB", (9, 5)), "TIFF", **_SECOND)}
    if find_spec("pypdfium2"):
        found |= {"two.pdf": pdf(["a", "b"]), "picture.pdf": with_picture((20, 20))}
    return found


_SECOND = {"save_all": True, "append_images": [Image.new("L", (5, 9))]}


def check_path(data: bytes) -> bool:
    """A path of a sample never leaves the data root."""
    text = data.decode("utf-8", "surrogateescape")
    root = folder() / "images"
    found = confined(text, root, where="x:1", field="images[0]")
    expect(found.is_relative_to(root.resolve()) and found.is_file(), "a file inside", found)
    return True


PATHS = {"plain": b"a.png", "below": b"VG_100K/7.jpg", "out": b"../a.png"}
TARGETS = (
    Target("image", check_image, _pictures(), "bytes", share=2),
    Target("embedded", check_embedded, _in_tables(), "bytes", share=1),
    Target("pages", check_pages, _documents(), "bytes", share=0.5),
    Target("path", check_path, PATHS, "text", ("..", "/", "./", "a.png", "\0"), 2, (SampleError,)),
)
