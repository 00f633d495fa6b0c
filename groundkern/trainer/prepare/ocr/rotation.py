"""Pages that lie on their side or on their head: found, read upright, boxes brought back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from groundkern.trainer.prepare.ocr.quality import letters, worth
from groundkern.trainer.prepare.ocr.scripts import ALONE
from groundkern.trainer.prepare.ocr.settings import Box, OcrWord, Reader

TURNS = (90, 180, 270)  # degrees, clockwise, that bring a page upright
CLEAR = 1.5  # a turned reading has to be this many times as good as the upright one
FEW = 10  # sure letters that a reading must have for a page to count as turned
_TRANSPOSED = {
    90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_90,
}  # Pillow turns counterclockwise


def read_upright(image: Image.Image, read: Reader, *, tells: bool) -> list[OcrWord]:
    """The words of an image, whichever way up it is.

    An engine that reads lines in all directions says how they stand, and the image is read again
    if most letters do not stand upright. Any other is shown the image in all four positions if
    what it reads at first is mostly unsure.

    Args:
        image: as it is stored, after EXIF.
        read: the engine.
        tells: whether the engine's words have a `turn`.

    Returns:
        Words with boxes in `image`; `turn` says how the page would have to be turned.
    """
    words = read(image)
    if tells:
        turn = common_turn(words)
        return _turned_reading(image, read, turn) if turn else words
    good = worth(words)
    if good >= max(FEW, letters(words) / 2):
        return words
    readings = [_turned_reading(image, read, turn) for turn in TURNS]
    best = max(readings, key=worth)
    return best if worth(best) > max(FEW, CLEAR * good) else words


def common_turn(words: Sequence[OcrWord]) -> int:
    """The turn that most letters need.

    Chinese and Japanese are also written downwards: their lines do not say that a page lies on its
    side.
    """
    turns: Counter[int] = Counter()
    for word in words:
        downwards = word.turn in (90, 270) and ALONE.match(word.text)
        turns[0 if downwards else word.turn] += letters([word])
    return max(turns, key=lambda turn: (turns[turn], turn == 0), default=0)


def _turned_reading(image: Image.Image, read: Reader, turn: int) -> list[OcrWord]:
    return [
        word._replace(box=turned(word.box, image.size, turn), turn=(word.turn + turn) % 360)
        for word in read(image.transpose(_TRANSPOSED[turn]))
    ]


def turned(box: Box, size: tuple[int, int], turn: int) -> Box:
    """Where a box of an image turned clockwise by `turn` degrees lies in the image itself.

    Args:
        box: in the turned image.
        size: width and height of the image before it was turned.
        turn: 0, 90, 180 or 270.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    match turn:
        case 90:
            return y0, height - x1, y1, height - x0
        case 180:
            return width - x1, height - y1, width - x0, height - y0
        case 270:
            return width - y1, x0, width - y0, x1
    return box
