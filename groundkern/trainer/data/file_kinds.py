"""What a file holds, by its first bytes, and what to do with one that Pillow does not open."""

from __future__ import annotations

import re

HEAD = 1024  # bytes by which a kind is told; a PDF may have other bytes before its own
_BEGINNINGS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0\x08\0", "TIFF"),
    (b"MM\0+\0\x08", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS\0\x01", "PSD"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"AT&TFORM", "DjVu"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
)
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_SVG = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml|<!--|<!DOCTYPE\s+svg|<svg)", re.I)
DOCUMENTS = ("PDF", "TIFF")  # have pages
PICTURES = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WebP", "JPEG 2000", "PSD", "AVIF", "HEIC")
ADVICE = {
    "PDF": "a PDF, whose pages `groundkern prepare words FILE.pdf` makes into images",
    "SVG": "an SVG, which is a drawing and has to be rendered to pixels first",
    "EPS": "an EPS, which is a drawing and has to be rendered to pixels first",
    "HEIC": "a HEIC image, which needs the package pillow-heif (pip install pillow-heif)",
    "AVIF": "an AVIF image, which needs a Pillow that was built with AVIF",
    "JPEG XL": "a JPEG XL image, which has to be converted to PNG or JPEG first",
    "DjVu": "a DjVu document, which has to be converted to PDF first",
    "video": "a video, which belongs into `videos`",
}


def kind_of(head: bytes) -> str | None:
    """What a file with these first bytes is: one of `PICTURES`, a key of `ADVICE`, or None.

    Args:
        head: its first `HEAD` bytes, or all if it has fewer.
    """
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "BMP"
    if head[4:8] == b"ftyp":  # the brand of a file, and those that it is compatible with
        size = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))}
        return "AVIF" if brands & _AVIF else "HEIC" if brands & _HEIC else "video"
    if b"%PDF-" in head:
        return "PDF"
    if _SVG.match(head) and b"<svg" in head.lower():
        return "SVG"
    return None
