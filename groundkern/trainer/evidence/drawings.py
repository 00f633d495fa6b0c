"""A task's drawings as one padded batch, made once: a step of training only picks its rows.

Drawing, decoding, tokenizing and image processing cost three times a step of a model this small.
So each drawing goes through the collator once, all of them together, and what that returned lies in
one file, for every seed and every method of the task.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from groundkern.hf import GroundedExample, GroundingCollator
from groundkern.hf.data.batch import FIELDS
from groundkern.maps import FIXED_POINT_ONE
from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import Sample, parse_sample
from groundkern.trainer.evidence.plan import Drawings
from groundkern.trainer.prepare.maps.tasks import stored, stream
from groundkern.trainer.progress import progress

MAP_LEVELS = (1.0, 0.1, 1e-3)  # of a target map: a target is a few visual tokens
MADE = "made.json"
_ASKED = (  # what a question asks for, where that differs between drawings
    r"(Read line |Is there a |Point to |the values? of (the )?|the line from |patch at second )"
    r"(?P<what>.*?)([.?]| lead| bar)"
)
_PIECE = 256  # drawings a call of the collator
PIXELS = {"pixel_values", "pixel_values_videos"}
Whole = dict[str, Tensor]
"""A padded batch of every drawing: tensors [N, ...], its PIXELS [N, patches, values]."""


def draw(folder: Path, drawings: Drawings, split: str, count: int) -> list[dict]:
    """The records of a split, drawn if they are not there yet; `images` are files of `folder`.

    Raises:
        ConfigError: drawings of other settings in the way.
    """
    path, made = folder / f"{split}.jsonl", {"count": count, **drawings.settings()}
    if path.exists():
        if durable.read_json(folder / f"{split}-{MADE}") != made:
            raise ConfigError(f"{folder} holds other drawings; choose another --output")
        return _records(path)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    with progress(f"drawing {drawings.task}, {split}", total=count, unit="drawing") as bar:
        drawn = stream(drawings.task, count=count, split=split, **drawings.arguments())
        for number, (drawing, record) in enumerate(drawn):
            named, files = stored(drawing, f"images/{split}-{number:05d}")
            for name, image in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                image.save(folder / name)
            records.append(shortened(record | named))
            bar.update()
    durable.write_json(folder / f"{split}-{MADE}", made)
    durable.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def most_frequent(folder: Path) -> float | None:
    """The share of held-out answers that always giving the same one gets right; None: not drawn."""
    path = folder / "test.jsonl"
    if not path.exists():
        return None
    answers = Counter(record["messages"][-1]["content"] for record in _records(path))
    return max(answers.values()) / answers.total()


def _records(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def shortened(record: dict) -> dict:
    """The record with no more of its question than what differs between drawings.

    A constant question says nothing, and its ten tokens are a fifth of what a model computes.
    """
    part = record["messages"][0]["content"][-1]
    found = re.search(_ASKED, part["text"])
    part["text"] = found["what"] if found else "?"
    return record


def as_text(record: dict) -> dict:
    """A page without its image: its words in order, and those asked for between asterisks.

    Where the question says what it asks for, none are between asterisks.
    """
    words = [word["text"] for word in record["words"]]
    question, answer = (dict(message) for message in record["messages"])
    asked = question["content"][-1]["text"]
    if asked == "?":
        (line,) = record["regions"]
        _, top, _, bottom = line["box"]
        middles = [(word["box"][1] + word["box"][3]) / 2 for word in record["words"]]
        marked = [number for number, middle in enumerate(middles) if top <= middle <= bottom]
        words.insert(marked[-1] + 1, "*")
        words.insert(marked[0], "*")
    question["content"] = f" {' '.join(words)}\n{asked}"
    return {"images": [], "messages": [question, answer]}


PARTS = {"space": "time", "time": "box"}
"""What a clip's regions lack if only their place is told (it holds in all of the clip), or only
their time (the whole frame)."""


def told(records: list[dict], part: str | None) -> list[dict]:
    """The records with one of PARTS of their regions; None: with all of them."""
    if part is None:
        return records
    lacks = PARTS[part]
    return [
        {**r, "regions": [{k: v for k, v in each.items() if k != lacks} for each in r["regions"]]}
        for r in records
    ]


def parsed(folder: Path, record: dict, number: int) -> Sample:
    """A drawing as a sample, whose pixels are in `folder`."""
    return parse_sample(record, root=folder, where=f"drawing {number}")


def collate(folder: Path, records: list[dict], collator: GroundingCollator) -> Whole:
    """All the records as one batch."""
    examples: list[GroundedExample] = []
    for number, record in enumerate(records):
        examples.append(parsed(folder, record, number).load())
    pieces = []
    with progress("collating", total=len(examples), unit="drawing") as bar:
        for start in range(0, len(examples), _PIECE):
            piece = collator(examples[start : start + _PIECE])
            rows = len(piece["input_ids"])
            for name in PIXELS & piece.keys():
                piece[name] = piece[name].unflatten(0, (rows, -1)).half()
            pieces.append(piece)
            bar.update(rows)
    pad = collator.processor.tokenizer.pad_token_id
    return {name: _stacked([p[name] for p in pieces], name, pad) for name in pieces[0]}


def _stacked(pieces: list[Tensor], name: str, pad: int) -> Tensor:
    """[N, ...]: pieces of any widths, padded as the collator pads them."""
    fill = {"input_ids": pad, "labels": -100, "attention_mask": 0, "mm_token_type_ids": 0}
    known = FIELDS.get(name.removeprefix("gk_"))
    value = fill.get(name, -1) if known is None else known.padding
    shape = [max(sizes) for sizes in zip(*(p.shape for p in pieces), strict=True)]
    out = pieces[0].new_full((sum(map(len, pieces)), *shape[1:]), value)
    start = 0
    for piece in pieces:
        out[(slice(start, start + len(piece)), *map(slice, piece.shape[1:]))] = piece
        start += len(piece)
    return out


def rows(
    whole: Whole, index: Tensor, position: Tensor | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The batch of some drawings.

    Args:
        whole: of `collate`.
        index: int64 [B].
        position: [3, N, S], the rotary positions of every drawing's tokens; None: the model's own.
        device: where the batch goes.
    """
    batch = {name: values[index] for name, values in whole.items()}
    for name in PIXELS & batch.keys():
        batch[name] = batch[name].flatten(0, 1).float()
    if position is not None:
        batch["position_ids"] = position[:, index]
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def kept(path: Path, make: Callable[[], Whole]) -> Whole:
    """The batch in a file, which is made and written if it is not there.

    So is one of an older version, whose collator did not make every tensor that a model is given.
    """
    if path.exists():
        found = torch.load(path, weights_only=True, mmap=True)
        if all(f"gk_{name}" in found for name in FIELDS):
            return found
    whole, buffer = make(), io.BytesIO()
    torch.save(whole, buffer)
    durable.write_bytes(path, buffer.getvalue())
    return whole


def shuffled_regions(whole: Whole, seed: int) -> Whole:
    """Every target map and region is that of another drawing: a control, which must not help."""
    target, inside = whole["gk_map_target"], whole["gk_side_inside"]  # [N, R, C], [N, G, S]
    maps = _of_another(target, whole["gk_map_position"] >= 0, seed)
    return {
        **whole,
        "gk_map_target": maps,
        "gk_side_inside": _of_another(inside, inside.any(-1), seed),
    }


def _of_another(values: Tensor, there: Tensor, seed: int) -> Tensor:
    """The rows that are `there` [N, R] of `values` [N, R, ...], each another drawing's first row.

    Rows of a drawing share a target: they belong to one answer.
    """
    index = there.any(1).nonzero()[:, 0]
    own, changed = values[index], values.clone()
    given = own[:, :1][_derangement(len(index), seed)].expand_as(own)
    changed[index] = torch.where(there[index][..., None], given, own)
    return changed


def uniform_map(whole: Whole, seed: int) -> Whole:
    """Every target map is the same over all visual tokens: a control, which must not help."""
    target = whole["gk_map_target"]
    return {**whole, "gk_map_target": torch.where(target >= 0, FIXED_POINT_ONE, target)}


def shuffled_words(whole: Whole, seed: int) -> Whole:
    """Every visual label is one of another drawing's: a control, which must not help."""
    label = whole["gk_word_label"]  # [N, R]
    there = label >= 0
    changed, bag = label.clone(), torch.full_like(whole["gk_word_bag"], -1)
    changed[there] = label[there][_derangement(int(there.sum()), seed)]
    for own, labels, given in zip(bag, changed, there, strict=True):
        distinct = labels[given].unique()
        own[0, : len(distinct)] = distinct[: own.shape[1]]
    alone = torch.full_like(whole["gk_several_label"], -1)
    return {**whole, "gk_word_label": changed, "gk_word_bag": bag, "gk_several_label": alone}


def _derangement(count: int, seed: int) -> Tensor:
    """A permutation [count] that leaves nothing in its place, unless there is only one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    return moved


def half_wrong(whole: Whole, seed: int) -> Whole:
    """Half of the drawings, drawn from the seed, have the target map and region of another one."""
    other, wrong = shuffled_regions(whole, seed), _wrong_half(whole, seed)[:, None, None]
    names = ("gk_map_target", "gk_side_inside")
    return {**whole, **{name: torch.where(wrong, other[name], whole[name]) for name in names}}


def half_gated(whole: Whole, seed: int) -> Whole:
    """The same, but the wrong half has a weight of 0: it teaches answers alone (W1)."""
    made, wrong = half_wrong(whole, seed), _wrong_half(whole, seed)[:, None]
    names = ("gk_map_weight", "gk_side_weight")
    return {**made, **{name: made[name].masked_fill(wrong, 0.0) for name in names}}


def _wrong_half(whole: Whole, seed: int) -> Tensor:
    count = len(whole["input_ids"])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1))
    return order < count // 2


CONTROLS: dict[str, Callable[[Whole, int], Whole]] = {
    "shuffled regions": shuffled_regions,
    "uniform map": uniform_map,
    "shuffled words": shuffled_words,
    "half wrong": half_wrong,
    "half wrong, gated": half_gated,
}
