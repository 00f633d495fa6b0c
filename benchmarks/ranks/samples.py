"""Examples of uneven lengths with every kind of supervision, dealt to ranks."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from benchmarks.ranks.cases import STEPS
from groundkern.hf import GroundedExample, Phrase, Region, Word

BATCH, ACCUMULATION = 2, 2  # per process
PATCH = 28  # pixels of a visual token
ODD_ONE = 1  # the rank that lacks something


def examples(ranks: int, share: str, steps: int = STEPS) -> list[GroundedExample]:
    """The samples of all steps, in the order in which `ranks` processes take them.

    Args:
        ranks: processes; the k-th pair of samples goes to rank k modulo `ranks`.
        share: of `cases.SHARES`: what the samples of rank 1 lack.
        steps: of the run.

    Returns:
        Every pair has an image and a trained answer, but for those of rank 1.
    """
    made = []
    for number in range(steps * ACCUMULATION * ranks * BATCH):
        odd = number // BATCH % ranks == ODD_ONE
        without_images = odd and share == "imageless"
        images = 0 if without_images else (1, 0, 2, 1, 1, 0)[number % 6]
        if not number % BATCH and not without_images:
            images = max(images, 1)
        made.append(_example(number, images, trained=not (odd and share == "rowless")))
    return made


def _example(number: int, images: int, *, trained: bool) -> GroundedExample:
    """One sample, the same for a number whoever asks."""
    draw = random.Random(number)
    sizes = [(draw.randint(2, 4) * PATCH, draw.randint(2, 4) * PATCH) for _ in range(images)]
    question = "Where is the red patch? " + "Read the word under the box. " * draw.randint(0, 3)
    patch = f"red patch is in row {draw.randint(1, 9)}"
    answer = f"The {patch}, column {draw.randint(1, 9)}." + " Call me Ishmael." * draw.randint(0, 2)
    start, stop = 4, 4 + len(patch)
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer, "train": trained},
    ]
    regions = [Region(1, start, stop, image, boxes=((0, 0, 0.5, 0.5),)) for image in range(images)]
    words = [
        Word(text, (x, 0.5, x + 0.45, 0.95), image)
        for image in range(images)
        for text, x in (("total", 0.0), ("single", 0.5))
    ]
    pictures = tuple(_picture(size, draw) for size in sizes)
    spans = ((0, 13, (8, 13)), (20, stop, (20, 23)), (0, stop, None)) if images else ()
    phrases = [Phrase(1, first, last, subject) for first, last, subject in spans]
    return GroundedExample(
        pictures, messages, tuple(regions), tuple(words), tuple(phrases), name=f"sample {number}"
    )


def _picture(size: tuple[int, int], draw: random.Random) -> Image.Image:
    image = Image.new("RGB", size, tuple(draw.randrange(256) for _ in range(3)))
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 2, size[1] // 2), fill="red")
    return image
