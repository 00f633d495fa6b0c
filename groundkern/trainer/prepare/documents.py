"""Documents with pages, PDF and TIFF: which pages there are, and a page as an image.

A page is made when its turn comes, in the worker that uses it, from a document that is opened for
it alone: the memory is that of one page, however many there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import (
    MAX_PIXELS,
    SampleError,
    check_size,
    decoded,
    opened,
    wrong,
)
from groundkern.trainer.prepare.pipeline import write_image
from groundkern.trainer.prepare.sources import Item

if TYPE_CHECKING:
    from groundkern.trainer.prepare.pipeline import Made, Work

MAX_PAGES = 10_000  # of a document
MAX_PAGE_PIXELS = 40_000_000  # of a rendered page: A0 at 150 dots per inch has 35 million
POINT = 72  # units of a PDF in an inch
_REDUCED = 0b101  # of a TIFF's NewSubfileType: a smaller copy of another page, or its mask
_NEW_SUBFILE_TYPE, _SUBFILE_TYPE = 254, 255
_REDUCED_BEFORE = 2  # of the SubfileType that TIFF 5 replaced, and scanners still write


@dataclass(frozen=True)
class Page:
    """A page of a document.

    Args:
        file: the document.
        kind: "PDF" or "TIFF".
        number: of the page as people count, from 1.
        frame: its index in the file, from 0.
        image: where its image goes, relative to the data root.
    """

    file: Path
    kind: str
    number: int
    frame: int
    image: str


@dataclass(frozen=True)
class OnPages:
    """Work on images that takes pages too: their images are written first.

    Args:
        work: on an item whose value is the path of an image.
        root: data root.
        dpi: dots per inch of a rendered page.
    """

    work: Work
    root: Path
    dpi: float

    def __call__(self, item: Item) -> Made:
        page = item.value
        if not isinstance(page, Page):
            return self.work(item)
        path = write_image(self.root / page.image, page_image(page, self.dpi, where=item.where))
        try:
            return self.work(Item(item.index, item.where, page.image))
        except SampleError:
            path.unlink()
            raise


def page_frames(file: Path, kind: str, *, where: str) -> list[int]:
    """The frames of a document that are pages.

    Args:
        file: the document.
        kind: "PDF" or "TIFF". A TIFF's smaller copies and masks of a page are no pages.
        where: what starts the error message.

    Raises:
        SampleError: damaged, encrypted, without a page, more than `MAX_PAGES`, or pypdfium2 is
            not installed.
    """
    if kind == "PDF":
        with _pdf(file, where) as pdf:
            frames = list(range(min(len(pdf), MAX_PAGES + 1)))
    else:
        frames = []
        with opened(file, file.name, where=where, field="document") as image:
            for frame in range(MAX_PAGES + 1):
                try:
                    image.seek(frame)
                except EOFError:
                    break
                except Exception as error:  # Pillow's readers raise nearly anything
                    got = f"{file.name!r} ({error})"
                    raise wrong(where, "document", "a readable TIFF", got) from None
                if not _smaller(image):
                    frames.append(frame)
    if not 0 < len(frames) <= MAX_PAGES:
        got = "none" if not frames else "more"
        raise wrong(where, "document", f"1 to {MAX_PAGES} pages", got)
    return frames


def _smaller(frame: Image.Image) -> bool:
    """Whether a frame of a TIFF is a smaller copy of another, or its mask."""
    subfile = frame.tag_v2.get(_NEW_SUBFILE_TYPE, 0)
    if frame.tag_v2.get(_SUBFILE_TYPE) == _REDUCED_BEFORE:
        return True
    return isinstance(subfile, int) and bool(subfile & _REDUCED)


def page_image(page: Page, dpi: float, *, where: str) -> Image.Image:
    """A page as upright RGB.

    Args:
        page: of a document that is there.
        dpi: dots per inch of a PDF's page; a TIFF has its own pixels.
        where: what starts the error message.

    Raises:
        SampleError: damaged, or too large.
    """
    if page.kind == "PDF":
        return _rendered(page, dpi, where)
    name, place = f"{page.file.name} page {page.number}", {"where": where, "field": "page"}
    with opened(page.file, name, **place) as image:
        try:
            image.seek(page.frame)
        except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
            raise wrong(where, "page", "one that can be read", f"{name!r} ({error})") from None
        check_size(image.size, image.format, name, **place)
        return decoded(image, name, **place)


def _rendered(page: Page, dpi: float, where: str) -> Image.Image:
    with _pdf(page.file, where) as pdf, _told(page, where):
        if pdf.get_formtype():
            pdf.init_forms()  # before the page: what was typed into its fields is drawn too
        with closing(pdf[page.frame]) as sheet:
            width, height = (side * dpi / POINT for side in sheet.get_size())
            if not 1 <= math.ceil(width) * math.ceil(height) <= MAX_PAGE_PIXELS:
                wanted = f"a page of at most {MAX_PAGE_PIXELS} pixels (a lower --dpi gives fewer)"
                got = f"{width:.0f} x {height:.0f} at {dpi:g} dots per inch"
                raise wrong(where, "page", wanted, got)
            for picture in sheet.get_objects(filter=[_image_object()]):
                size = picture.get_px_size()
                if size[0] * size[1] > MAX_PIXELS:
                    wanted = f"pictures of at most {MAX_PIXELS} pixels on a page"
                    raise wrong(where, "page", wanted, f"{size[0]} x {size[1]}")
            return sheet.render(scale=dpi / POINT, rev_byteorder=True).to_pil().convert("RGB")


@contextmanager
def _pdf(file: Path, where: str) -> Iterator[Any]:
    """An open PDF.

    Raises:
        SampleError: it cannot be opened, or pypdfium2 is not installed.
    """
    try:
        from pypdfium2 import PdfDocument, PdfiumError
    except ImportError:
        raise SampleError(
            f"{where}: a PDF needs the package pypdfium2 (pip install pypdfium2)"
        ) from None
    try:
        found = PdfDocument(file)
    except (PdfiumError, OSError, ValueError) as error:
        locked = "password" in str(error).lower()
        wanted = "a PDF without a password" if locked else "a readable PDF"
        raise wrong(where, "document", wanted, f"{file.name!r} ({error})") from None
    with closing(found):
        yield found


@contextmanager
def _told(page: Page, where: str) -> Iterator[None]:
    """Names the page in what pypdfium2 raises."""
    from pypdfium2 import PdfiumError

    try:
        yield
    except (PdfiumError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, SampleError):
            raise
        got = f"{page.file.name!r} page {page.number} ({error})"
        raise wrong(where, "page", "one that can be rendered", got) from None


def _image_object() -> int:
    from pypdfium2.raw import FPDF_PAGEOBJ_IMAGE

    return FPDF_PAGEOBJ_IMAGE


def chosen_pages(text: str | None) -> list[range]:
    """What `--pages` says: "1-3,7" is pages 1, 2, 3 and 7, "5-" the fifth and all after it.

    Raises:
        ConfigError: not of this form.
    """
    ranges = []
    for part in (text or "1-").split(","):
        found = re.fullmatch(r"\s*([1-9]\d{0,5})\s*(-\s*([1-9]\d{0,5})?)?\s*", part)
        first = int(found[1]) if found else 0
        last = (int(found[3]) if found[3] else MAX_PAGES if found[2] else first) if found else 0
        if not 0 < first <= last:
            raise ConfigError(f"--pages: expected numbers such as 1-3,7, got {text!r}")
        ranges.append(range(first, last + 1))
    return ranges
