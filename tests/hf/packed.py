"""The samples of tests/hf/samples.py in packed rows, as the collator lays them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groundkern.hf.data.packing import join_fields
from groundkern.hf.data.padding import pad_fields, pad_tokens
from tests.hf.samples import Sample, _encode, _images, make_batch

PAD = 0  # the token that fills the ends of rows


def packed_batch(model: nn.Module, rows: list[tuple[Sample, ...]]) -> dict[str, Tensor]:
    """Rows of several samples, as keyword inputs of the model; the shorter ones are filled."""
    token = getattr(model.config, "image_token_id", None)
    ids, positions, fields = [], [], []
    for row in rows:
        encoded = [_encode(sample, token) for sample in row]
        for _, own in encoded:
            own["phrase_composite"] = [list(three) for three in own["phrase_composite"]]
        lengths = [len(x) for x, _ in encoded]
        images = [len(_images(sample)) for sample in row]
        ids.append(torch.cat([x for x, _ in encoded]))
        positions.append(torch.cat([torch.arange(n) for n in lengths]))
        fields.append(join_fields([own for _, own in encoded], lengths, images))
    lengths = [len(x) for x in ids]
    batch = {
        "input_ids": pad_tokens(ids, PAD, left=False),
        "position_ids": torch.stack(
            [torch.cat((x, torch.arange(max(lengths) - len(x)))) for x in positions]
        ),
        **pad_fields(fields, lengths, left=False),
    }
    samples = tuple(sample for row in rows for sample in row)
    unpacked = make_batch(model, samples) if token is not None else {}
    batch |= {name: x for name, x in unpacked.items() if name in ("pixel_values", "image_grid_thw")}
    if "mm_token_type_ids" in unpacked:
        batch["mm_token_type_ids"] = (batch["input_ids"] == token).int()
    return batch


def without_images(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """Those that have none."""
    return tuple(sample for sample in samples if not _images(sample))
