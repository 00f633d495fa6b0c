"""Uneven hand-made samples with every kind of supervision, batched with padding on either side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_TEXT_ID = 20  # beyond the special tokens
TOKENS_WIDE = ("input_ids", "attention_mask", "mm_token_type_ids", "gk_image", "gk_side_inside")


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


# Two images in one sample, none in another; 0 to 3 rows; one region twice; bags of 0 to 3 labels.
SAMPLES = {
    "qwen": (
        Sample(
            seed=1,
            pieces=(4, (2, 3), 9),
            answer=5,
            aligned=((4, (0, 4)), (2, (5,))),
            words=((1, 30), (3, 31), (5, 30)),
            maps=((2, 0),),
            phrases=(((5, 4), (4,)), ((2,), (2,)), ((5, 4, 3, 2), ())),
            composites=((2, 0, 1),),
            lens=((0, 60, 1), (1, 60, 1), (5, 60, 0)),
        ),
        Sample(
            seed=2,
            pieces=(3, (2, 2), 2, (1, 3), 12),
            answer=7,
            aligned=((5, (4, 6)),),
            words=((2, 40), (5, 41)),
            maps=((1, 0), (3, 1)),
            phrases=(((7, 6), (6,)), ((4, 3), ()), ((7, 6, 5, 4, 3), ()), ((1,), (1,))),
            composites=((2, 0, 1), (2, 1, 3)),
        ),
        Sample(seed=3, pieces=(11,), answer=6, phrases=(((6, 5), (5,)),)),
        Sample(
            seed=4,
            pieces=(2, (3, 3), 8),
            answer=4,
            aligned=((3, (0, 1)), (2, (0, 1)), (1, (8,))),
            words=((8, 50), (2, 51), (4, 52)),
            maps=((2, 0),),
            lens=((3, 61, 1), (4, 61, 0), (6, 61, 0), (0, 62, 0)),
        ),
    ),
    "llava": (
        Sample(
            seed=5,
            pieces=(4, (4, 4), 9),
            answer=5,
            aligned=((4, (0, 4)), (2, (5,))),
            words=((1, 30), (3, 31), (5, 30)),
            maps=((2, 0),),
            phrases=(((5, 4), (4,)), ((2,), (2,)), ((5, 4, 3, 2), ())),
            composites=((2, 0, 1),),
            lens=((0, 60, 1), (1, 60, 1), (5, 60, 0)),
        ),
        Sample(
            seed=6,
            pieces=(3, (4, 4), 2, (4, 4), 12),
            answer=7,
            aligned=((5, (4, 26)),),
            words=((2, 40), (25, 41)),
            maps=((1, 0), (3, 1)),
            phrases=(((7, 6), (6,)), ((4, 3), ()), ((7, 6, 5, 4, 3), ()), ((1,), (1,))),
            composites=((2, 0, 1), (2, 1, 3)),
        ),
        Sample(seed=7, pieces=(11,), answer=6, phrases=(((6, 5), (5,)),)),
        Sample(
            seed=8,
            pieces=(2, (4, 4), 8),
            answer=4,
            aligned=((3, (0, 1)), (2, (0, 1)), (1, (8,))),
            words=((8, 50), (2, 51), (4, 52)),
            maps=((2, 0),),
            lens=((3, 61, 1), (4, 61, 0), (6, 61, 0), (0, 62, 0)),
        ),
    ),
}


def make_batch(model, samples: tuple[Sample, ...], *, side: str = "right") -> dict[str, Tensor]:
    """What a processor and collator would make of the samples, as keyword inputs of the model."""
    qwen = hasattr(model.config, "vision_start_token_id")
    rows = [_encode(sample, model.config.image_token_id) for sample in samples]
    length = max(len(row["input_ids"]) for row in rows)
    batch = {name: _pad([row[name] for row in rows], name, length, side) for name in rows[0]}
    if side == "left":
        shift = torch.tensor([[length - len(row["input_ids"])] for row in rows])
        for name in batch:
            if name.endswith(("_position", "_columns")):
                batch[name] = torch.where(batch[name] >= 0, batch[name] + shift, -1)
    for name, x in batch.items():
        if name.startswith("gk_") and x.dtype == torch.int64 and not name.endswith("_label"):
            batch[name] = x.int()
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


def _images(sample: Sample) -> list[tuple[int, int]]:
    return [piece for piece in sample.pieces if isinstance(piece, tuple)]


def _random(sample: Sample, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sample.seed))


def _encode(sample: Sample, image_token: int) -> dict[str, Tensor]:
    """One sample's tensors, without padding."""
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
    return {
        "input_ids": torch.where(image >= 0, image_token, ids),
        "attention_mask": torch.ones(length, dtype=torch.int64),
        "gk_image": image,
        "gk_text_position": torch.arange(length - sample.answer - 1, length - 1),
        "gk_side_position": torch.tensor([length - k - 1 for k, _ in sample.aligned]).long(),
        "gk_side_set": torch.tensor([regions.index(r) for _, r in sample.aligned]).long(),
        "gk_side_inside": inside,
        "gk_word_position": columns[[v for v, _ in sample.words]],
        "gk_word_label": torch.tensor([w for _, w in sample.words]).long(),
        "gk_word_bag": bag,
        "gk_map_position": torch.tensor([length - k for k, _ in sample.maps]).long(),
        "gk_map_image": torch.tensor([number for _, number in sample.maps]).long(),
        "gk_map_target": target,
        "gk_map_columns": columns,
        **_phrases(sample, length),
        "gk_lens_position": columns[[v for v, _, _ in sample.lens]],
        "gk_lens_label": torch.tensor([w for _, w, _ in sample.lens]).long(),
        "gk_lens_inside": torch.tensor([i for _, _, i in sample.lens]).long(),
    }


def _phrases(sample: Sample, length: int) -> dict[str, Tensor]:
    rows = [
        (length - k - 1, number, int(k in subject))
        for number, (tokens, subject) in enumerate(sample.phrases)
        for k in tokens
    ]
    position, number, subject = torch.tensor(rows).long().reshape(-1, 3).unbind(1)
    return {
        "gk_phrase_position": position,
        "gk_phrase_number": number,
        "gk_phrase_subject": subject,
        "gk_phrase_composite": torch.tensor(sample.composites).long().reshape(-1, 3),
    }


def _pad(tensors: list[Tensor], name: str, length: int, side: str) -> Tensor:
    """Stack tensors of uneven sizes; token axes, always last, are padded on `side`."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in tensors), strict=True)]
    wide = name in TOKENS_WIDE
    if wide:
        shape[-1] = length
    fill = 0 if name in ("input_ids", "attention_mask", "gk_side_inside") else -1
    out = tensors[0].new_full((len(tensors), *shape), fill)
    for row, x in zip(out, tensors, strict=True):
        view = row[tuple(slice(n) for n in x.shape[:-1])]
        first = length - x.shape[-1] if wide and side == "left" else 0
        view[..., first : first + x.shape[-1]] = x
    return out
