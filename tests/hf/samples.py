"""Uneven hand-made samples with every kind of supervision, batched with padding on either side."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groundkern.hf.data.padding import SampleFields, pad_fields, pad_tokens

FIRST_TEXT_ID = 20  # beyond the special tokens


@dataclass(frozen=True)
class Sample:
    """Text around images, and what it supervises. Visual tokens are numbered through all images.

    Args:
        seed: of its token ids, pixels and target maps.
        pieces: a number of text tokens, or the (height, width) of an image in visual tokens.
        answer: how many tokens at the end are trained.
        aligned: (token counted from the end, visual tokens inside its regions).
        words: (visual token, label).
        maps: (token counted from the end, image).
        phrases: (its tokens counted from the end, those of its subject).
        composites: numbers of a phrase and its two parts.
        lens: (visual token, label, 1 inside or 0 outside).
        contrast: (visual token, the words whose regions it is on).
        weights: of the rows of each group, in turn; of phrases, one for each. None: left out.
    """

    seed: int
    pieces: tuple[int | tuple[int, int], ...]
    answer: int
    aligned: tuple[tuple[int, tuple[int, ...]], ...] = ()
    words: tuple[tuple[int, int], ...] = ()
    maps: tuple[tuple[int, int], ...] = ()
    phrases: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    composites: tuple[tuple[int, int, int], ...] = ()
    lens: tuple[tuple[int, int, int], ...] = ()
    contrast: tuple[tuple[int, tuple[int, ...]], ...] = ()
    weights: tuple[float, ...] | None = None


def _uneven(seed: int, sizes: tuple[tuple[int, int], ...], late: tuple[int, int]):
    """Two images in one sample, none in another; 0 to 3 rows; one region twice; 0 to 3 labels.

    Args:
        seed: of the first sample.
        sizes: (height, width) of the four images.
        late: visual tokens of the second image of two, for a region and for a word.
    """
    first, second, third, fourth = sizes
    return (
        Sample(
            seed=seed,
            pieces=(4, first, 9),
            answer=5,
            aligned=((4, (0, 4)), (2, (5,))),
            words=((1, 30), (3, 31), (5, 30)),
            maps=((2, 0),),
            phrases=(((5, 4), (4,)), ((2,), (2,)), ((5, 4, 3, 2), ())),
            composites=((2, 0, 1),),
            lens=((0, 60, 1), (1, 60, 1), (5, 60, 0)),
            contrast=((0, (70,)), (1, (70, 71)), (4, (71,))),
        ),
        Sample(
            seed=seed + 1,
            pieces=(3, second, 2, third, 12),
            answer=7,
            aligned=((5, (4, late[0])),),
            words=((2, 40), (late[1], 41)),
            maps=((1, 0), (3, 1)),
            phrases=(((7, 6), (6,)), ((4, 3), ()), ((7, 6, 5, 4, 3), ()), ((1,), (1,))),
            composites=((2, 0, 1), (2, 1, 3)),
            contrast=((1, (70,)), (2, (72,)), (late[1], (70,)), (late[0], (71, 73))),
        ),
        Sample(seed=seed + 2, pieces=(11,), answer=6, phrases=(((6, 5), (5,)),)),
        Sample(
            seed=seed + 3,
            pieces=(2, fourth, 8),
            answer=4,
            aligned=((3, (0, 1)), (2, (0, 1)), (1, (8,))),
            words=((8, 50), (2, 51), (4, 52)),
            maps=((2, 0),),
            lens=((3, 61, 1), (4, 61, 0), (6, 61, 0), (0, 62, 0)),
        ),
    )


SAMPLES = {
    "qwen": _uneven(1, ((2, 3), (2, 2), (1, 3), (3, 3)), (6, 5)),
    "llava": _uneven(5, ((4, 4),) * 4, (26, 25)),
}


def weighted(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """The same with weights of all kinds, others in each sample; some rows have 0."""
    weights = (0.5, 2.0, 1.0, 0.0, 3.0)
    return tuple(
        replace(sample, weights=(*weights[n % 5 :], *weights[: n % 5]))
        for n, sample in enumerate(samples)
    )


def make_batch(model, samples: tuple[Sample, ...], *, side: str = "right") -> dict[str, Tensor]:
    """What a processor and collator would make of the samples, as keyword inputs of the model."""
    qwen = hasattr(model.config, "vision_start_token_id")
    batch = token_batch(model.config.image_token_id, samples, side=side)
    images = [(size, sample) for sample in samples for size in _images(sample)]
    if not images:
        return batch
    if not qwen:
        pixels = [_random(sample, 3, 56, 56) for _, sample in images]
        return {**batch, "pixel_values": torch.stack(pixels)}
    grids = torch.tensor([(1, 2 * h, 2 * w) for (h, w), _ in images])
    pixels = [_random(sample, 4 * h * w, 1176) for (h, w), sample in images]
    token_types = (batch["input_ids"] == model.config.image_token_id).int()
    return {
        **batch,
        "mm_token_type_ids": token_types,
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": grids,
    }


def token_batch(
    image_token: int | None, samples: tuple[Sample, ...], *, side: str = "right"
) -> dict[str, Tensor]:
    """The samples without pixels; without an image token, visual tokens are like any others."""
    left = side == "left"
    encoded = [_encode(sample, image_token) for sample in samples]
    ids = [token_ids for token_ids, _ in encoded]
    batch = {
        "input_ids": pad_tokens(ids, 0, left=left),
        "attention_mask": pad_tokens([torch.ones_like(x) for x in ids], 0, left=left),
        **pad_fields([fields for _, fields in encoded], [len(x) for x in ids], left=left),
    }
    batch["gk_word_bag"] = batch["gk_word_bag"].int()  # either integer type will do
    return batch


def _images(sample: Sample) -> list[tuple[int, int]]:
    return [piece for piece in sample.pieces if isinstance(piece, tuple)]


def _random(sample: Sample, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sample.seed))


def _encode(sample: Sample, image_token: int | None) -> tuple[Tensor, SampleFields]:
    """One sample's token ids, and what it supervises."""
    image = []
    for piece in sample.pieces:
        number = max(image, default=-1) + 1
        image += [number] * (piece[0] * piece[1]) if isinstance(piece, tuple) else [-1] * piece
    image = torch.tensor(image)
    length = len(image)
    generator = torch.Generator().manual_seed(sample.seed)
    ids = torch.randint(FIRST_TEXT_ID, 400, (length,), generator=generator)
    columns = (image >= 0).nonzero()[:, 0]
    regions = sorted({region for _, region in sample.aligned})
    inside = torch.zeros(len(regions), length, dtype=torch.bool)
    for g, region in enumerate(regions):
        inside[g, columns[list(region)]] = True
    target = torch.zeros(len(sample.maps), len(columns), dtype=torch.int64)
    for r, (_, number) in enumerate(sample.maps):
        own = image[columns] == number
        peaks = torch.randint(0, 2**20, (int(own.sum()),), generator=generator)
        target[r, own] = peaks * (peaks % 3 > 0)  # some columns have no mass
    bag = torch.full((len(_images(sample)), 3), -1)
    for number in range(len(bag)):
        labels = sorted({w for v, w in sample.words if image[columns[v]] == number})
        bag[number, : len(labels)] = torch.tensor(labels)
    rows = [
        (length - k - 1, number, int(k in subject))
        for number, (tokens, subject) in enumerate(sample.phrases)
        for k in tokens
    ]
    words = [set() for _ in _images(sample)]
    for v, said in sample.contrast:
        words[image[columns[v]]] |= set(said)
    if image_token is not None:
        ids = torch.where(image >= 0, image_token, ids)
    numbers = {
        "side": range(len(sample.aligned)),
        "word": range(len(sample.words)),
        "map": range(len(sample.maps)),
        "phrase": [number for _, number, _ in rows],
        "lens": range(len(sample.lens)),
        "contrast": range(len(sample.contrast)),
    }
    weights = {
        f"{group}_weight": [sample.weights[n % len(sample.weights)] for n in own]
        for group, own in numbers.items()
        if sample.weights is not None
    }
    return ids, {
        **weights,
        "image": image,
        "text_position": torch.arange(length - sample.answer - 1, length - 1),
        "side_position": [length - k - 1 for k, _ in sample.aligned],
        "side_set": [regions.index(r) for _, r in sample.aligned],
        "side_inside": inside,
        "word_position": columns[[v for v, _ in sample.words]],
        "word_label": [w for _, w in sample.words],
        "word_bag": bag,
        "map_position": [length - k for k, _ in sample.maps],
        "map_token_position": [  # of every other row the next one's
            length - k + (n % 2 and k > 1) for n, (k, _) in enumerate(sample.maps)
        ],
        "map_image": [number for _, number in sample.maps],
        "map_target": target,
        "map_columns": columns,
        "phrase_position": [position for position, _, _ in rows],
        "phrase_number": [number for _, number, _ in rows],
        "phrase_subject": [subject for _, _, subject in rows],
        "phrase_composite": sample.composites,
        "lens_position": columns[[v for v, _, _ in sample.lens]],
        "lens_label": [w for _, w, _ in sample.lens],
        "lens_inside": [i for _, _, i in sample.lens],
        "contrast_position": columns[[v for v, _ in sample.contrast]],
        "contrast_label": [said for _, said in sample.contrast],
        "contrast_bag": [sorted(each) for each in words],
    }
