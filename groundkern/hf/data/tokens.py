"""What runs along with the tokens of a sequence: `input_ids`, kinds of tokens, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from groundkern.hf.data.layout import Layout
from groundkern.hf.data.padding import SampleFields, pad_tokens

# what the processor returns per token, and the value that pads it (None: the tokenizer's)
PER_TOKEN = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "moe_mm_token_type_ids": 0,
}
TokenRows = dict[str, list[list[int]]]
"""By name, for each sample or row, a value for each of its tokens."""


def token_rows(
    per_token: Mapping[str, list[list[int]]],
    layouts: Sequence[Layout],
    samples: Sequence[SampleFields],
    *,
    marks_prefix: bool,
) -> TokenRows:
    """What runs along with the tokens that stay of each sample, and `labels`.

    Args:
        per_token: what the processor returned, by names of PER_TOKEN.
        layouts: of each sample.
        samples: what each supervises.
        marks_prefix: whether `token_type_ids` tell a prefix from what is learned (PaliGemma).
    """
    tokens = {
        key: [[row[i] for i in layout.stays] for row, layout in zip(values, layouts)]
        for key, values in per_token.items()
    }
    if "token_type_ids" in tokens and marks_prefix:
        types = zip(tokens["token_type_ids"], samples)
        tokens["token_type_ids"] = [_suffix(row, own["text_position"]) for row, own in types]
    tokens["labels"] = []
    for layout, sample in zip(layouts, samples):
        labels = [-100] * len(layout.ids)
        for p in sample["text_position"]:
            labels[p + 1] = layout.ids[p + 1]
        tokens["labels"].append(labels)
    return tokens


def padded_tokens(
    tokens: TokenRows, pad_token: int, *, left: bool, multiple: int = 1
) -> dict[str, Tensor]:
    """int64 [B, S] of each name.

    Args:
        tokens: of rows of any lengths.
        pad_token: the id that pads `input_ids`.
        left: whether rows are padded on the left.
        multiple: what S is a multiple of.
    """
    fills = {**PER_TOKEN, "input_ids": pad_token, "labels": -100}
    return {
        name: pad_tokens(rows, fills.get(name) or 0, left=left, multiple=multiple)
        for name, rows in tokens.items()
    }


def without_padding(features: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor returned of samples that it padded, with lists as long as each sequence.

    Args:
        features: with `attention_mask`.
    """
    keep = [[i for i, real in enumerate(row) if real] for row in features["attention_mask"]]
    cut = dict(features)
    for key in ("offset_mapping", *PER_TOKEN):
        if key in cut:
            cut[key] = [[row[i] for i in kept] for row, kept in zip(cut[key], keep)]
    cut.pop("labels", None)  # of PaliGemma's
    return cut


def _suffix(row: list[int], text_position: list[int]) -> list[int]:
    """0 up to the first token to learn, 1 from there: it and all that follow see no later one."""
    first = text_position[0] + 1 if text_position else len(row)
    return [int(position >= first) for position in range(len(row))]
