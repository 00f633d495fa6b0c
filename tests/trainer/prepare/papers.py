"""PDF files written by hand: pages with text, with a picture that lies about its size, locked."""

from __future__ import annotations

from collections.abc import Sequence


def pdf(
    texts: Sequence[str], size: tuple[float, float] = (200, 100), *, locked: bool = False
) -> bytes:
    """A PDF with a page for each text, `size` in points; `locked` asks for a password."""
    pages = [b"/Contents %d 0 R" % (4 + 2 * n) for n in range(len(texts))]
    streams = [b"BT /F 24 Tf 10 40 Td (%s) Tj ET" % text.encode() for text in texts]
    return _file(pages, streams, size, locked=locked)


def with_picture(pixels: tuple[int, int]) -> bytes:
    """A PDF whose page draws an image that claims so many pixels and has hardly a byte."""
    picture = b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceGray "
    picture = picture % pixels + b"/BitsPerComponent 8 /Length 1 >>\nstream\n0\nendstream"
    page = b"/Contents 4 0 R"
    stream = b"q 180 0 0 90 10 5 cm /I Do Q"
    return _file([page], [stream], (200, 100), picture=picture)


def _file(
    pages: list[bytes],
    streams: list[bytes],
    size: tuple[float, float],
    *,
    picture: bytes = b"null",
    locked: bool = False,
) -> bytes:
    last = 3 + 2 * len(pages)
    kids = b" ".join(b"%d 0 R" % (3 + 2 * n) for n in range(len(pages)))
    box = b"[0 0 %f %f]" % size
    common = b"/Resources << /Font << /F %d 0 R >> /XObject << /I %d 0 R >> >> /MediaBox %s" % (
        last,
        last + 1,
        box,
    )
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%s] %s >>" % (len(pages), kids, common),
    ]
    for page, stream in zip(pages, streams, strict=True):
        objects.append(b"<< /Type /Page /Parent 2 0 R %s >>" % page)
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    objects += [b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>", picture]
    lock = b""
    if locked:
        key = b"<" + b"00" * 32 + b">"
        lock = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O %s /U %s >> /ID [%s %s]" % (
            (key,) * 4
        )
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, each in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer << /Size %d /Root 1 0 R %s >>\n" % (len(objects) + 1, lock)
    out += b"startxref\n%d\n%%%%EOF\n" % start
    return bytes(out)
