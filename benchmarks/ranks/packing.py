"""`python -m benchmarks.ranks.packing`: packed batches against padded ones, in one process on CPU.

The same steps (forward and backward of every batch) with each way of making rows, in rounds that
alternate: CPU time, padding, and whether the losses are the same. Samples are those of the demo of
`groundkern`, and its pictures with answers of log-normal lengths. Exit status 1 if a loss
differs by more than 1e-5 or a way is refused.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.ranks.table import TOLERANCE, WIDTH, lines_of, made_with, write_csv
from groundkern.hf import (
    DvSft,
    GroundedExample,
    GroundingCollator,
    Klal,
    Smam,
    attach,
    row_counts,
)
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.demo.make import make_demo
from groundkern.trainer.drawing.texts import texts
from groundkern.trainer.loading import open_model

MEDIAN, SIGMA, MOST = 90, 0.9, 600  # words of an answer; the log-normal's median and sigma
ONE_ROW = 10**9  # a row that every batch fits into
KINDS = ("demo", "log-normal")
COLUMNS = (
    *("samples", "rows", "padding", "tokens a batch", "longest row", "tokens/s", "against padded"),
    *("loss", "gradient", "collating"),
)


class Way(NamedTuple):
    """A way of making rows of samples.

    Args:
        name: for the table.
        pack_to: of the collator.
        grouped: batches of samples of about the same length: other samples to a step.
    """

    name: str
    pack_to: int | None = None
    grouped: bool = False


class Prepared(NamedTuple):
    """What is timed.

    Args:
        way: how its rows were made.
        batches: one to a step.
        tokens: those that are not padding, in all batches.
        laid: with padding.
        seconds: CPU time of collating.
    """

    way: Way
    batches: list[dict[str, Tensor]]
    tokens: int
    laid: int
    seconds: float


def main(words: list[str] | None = None) -> int:
    """Print a line for each way; write the files that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks.packing", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=4, help="batches")
    parser.add_argument("--batch-size", type=int, default=16, help="samples in each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pack-to", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--csv", type=Path, help="file for every figure")
    parser.add_argument("--markdown", type=Path, help="file for the page")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    rows, same = [], True
    with tempfile.TemporaryDirectory(prefix="packing-") as made:
        demo = Path(made)
        make_demo(demo, samples=8 * max(64, options.steps * options.batch_size))
        for kind in options.kinds:
            for row, equal in _measured(kind, demo, options):
                print("  ".join(row), flush=True)
                rows.append(row)
                same &= equal
    command = " ".join(["python -m benchmarks.ranks.packing", *(words or sys.argv[1:])])
    if options.csv is not None:
        write_csv(options.csv, COLUMNS, rows)
    if options.markdown is not None:
        options.markdown.write_text(_page(rows, command, options), encoding="utf-8")
    return int(not same)


def _measured(
    kind: str, demo: Path, options: argparse.Namespace
) -> list[tuple[tuple[str, ...], bool]]:
    """The rows of the table for one kind of samples, and whether each has the padded losses."""
    examples = _examples(kind, demo, options.steps * options.batch_size)
    model, processor = open_model(str(demo / "model"), attn_implementation="sdpa", dtype="float32")
    attach(model, smam=Smam(), dv_sft=DvSft(), klal=Klal()).train()
    collate = partial(GroundingCollator, processor, model.config)
    ways = [Way("padded"), Way("padded, grouped by length", grouped=True)]
    ways += [Way(f"pack_to {size}", size) for size in options.pack_to] + [Way("one row", ONE_ROW)]
    prepared, begun, refused = [], [], []
    for way in ways:
        try:
            each = _prepared(way, examples, collate(pack_to=way.pack_to), options)
            begun.append(_stepped(model, each))
            prepared.append(each)
        except ValueError as error:
            row = (kind, way.name, *[""] * (len(COLUMNS) - 3), f"refused: {error}")
            refused.append((row, False))
    times = _timed(model, prepared, options.rounds)
    found = [
        _row(kind, each, own, begun[0], times[n], times[0], options)
        for n, (each, own) in enumerate(zip(prepared, begun))
    ]
    return found + refused


def _row(
    kind: str,
    prepared: Prepared,
    own: tuple[list[float], Tensor],
    padded: tuple[list[float], Tensor],
    times: list[float],
    padded_times: list[float],
    options: argparse.Namespace,
) -> tuple[tuple[str, ...], bool]:
    losses, gradient = own
    apart = max(abs(x - y) / abs(y) for x, y in zip(losses, padded[0]))
    turned = float((gradient - padded[1]).norm() / padded[1].norm())
    speed = prepared.tokens / median(times)
    reference = [y / x for x, y in zip(times, padded_times)]
    cells = (
        *(kind, prepared.way.name, f"{1 - prepared.tokens / prepared.laid:.1%}"),
        str(prepared.tokens // len(prepared.batches)),
        str(max(batch["input_ids"].shape[1] for batch in prepared.batches)),
        *(f"{speed:.0f}", f"{median(reference):.2f}"),
    )
    told = ("other samples", "other samples") if prepared.way.grouped else ("", "")
    told = told if prepared.way.grouped else (f"{apart:.1e}", f"{turned:.1e}")
    same = prepared.way.grouped or apart <= TOLERANCE
    each = prepared.seconds / (options.steps * options.batch_size)
    return (*cells, *told, f"{1e3 * each:.1f} ms"), same


def _examples(kind: str, demo: Path, count: int) -> list[GroundedExample]:
    """Samples of the demo's training file; or pictures of it with longer answers."""
    dataset = JsonLinesDataset(demo / "train.jsonl", root=demo, cache=demo)
    examples = [dataset[i] for i in range(count)]
    if kind == "demo":
        return examples
    draw = random.Random(0)
    return [_longer(example, draw) for example in examples]


def _longer(example: GroundedExample, draw: random.Random) -> GroundedExample:
    """With a passage of a text behind its answer."""
    words = min(MOST, max(1, round(draw.lognormvariate(0, SIGMA) * MEDIAN)))
    text = draw.choice(texts())
    start = draw.randrange(len(text))
    passage = (text[start:] + text * (1 + words // len(text)))[:words]
    *before, answer = example.messages
    longer = {**answer, "content": f"{_text(answer)} {' '.join(passage)}"}
    return replace(example, messages=[*before, longer])


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _prepared(
    way: Way, examples: Sequence[GroundedExample], collate: Any, options: argparse.Namespace
) -> Prepared:
    order = list(range(len(examples)))
    if way.grouped:
        alone = GroundingCollator(collate.processor, collate.config)
        lengths = [alone([example])["input_ids"].shape[1] for example in examples]
        generator = torch.Generator().manual_seed(0)
        order = get_length_grouped_indices(
            lengths, options.batch_size, mega_batch_mult=options.steps, generator=generator
        )
    begun = time.process_time()
    batches = [
        collate([examples[i] for i in order[at : at + options.batch_size]])
        for at in range(0, len(order), options.batch_size)
    ]
    seconds = time.process_time() - begun
    laid = sum(batch["input_ids"].numel() for batch in batches)
    return Prepared(way, batches, collate.counts["tokens"], laid, seconds)


def _stepped(model: nn.Module, prepared: Prepared) -> tuple[list[float], Tensor]:
    """The loss of each batch, and the sum of their gradients."""
    model.zero_grad()
    losses = []
    for batch in prepared.batches:
        loss = model(**batch, gk_totals=row_counts(batch)).loss
        loss.backward()
        losses.append(float(loss))
    trained = [p for p in model.parameters() if p.grad is not None]
    return losses, torch.cat([p.grad.flatten() for p in trained]).double()


def _timed(model: nn.Module, prepared: Sequence[Prepared], rounds: int) -> list[list[float]]:
    """CPU seconds of all steps, for each way and round; ways take turns in a new order."""
    times: list[list[float]] = [[] for _ in prepared]
    draw = random.Random(0)
    for _ in range(rounds):
        for n in draw.sample(range(len(prepared)), len(prepared)):
            begun = time.process_time()
            _stepped(model, prepared[n])
            times[n].append(time.process_time() - begun)
    return times


def _page(rows: list[tuple[str, ...]], command: str, options: argparse.Namespace) -> str:
    about = (
        f"One thread; {options.steps} batches of {options.batch_size} samples, the model of the "
        "trainer's demo with SMAM, DV-SFT and KLAL, sdpa, forward and backward; medians of "
        f"{options.rounds} rounds that alternate. Log-normal: answers of {MEDIAN} words in the "
        f"median with sigma {SIGMA}, {MOST} at most. Tokens are those that are not padding, and "
        "seconds are CPU time. `against padded` is the padded time over this one, of the same "
        "round; `loss` the largest relative difference of a step's loss, `gradient` that of the "
        "steps' gradients together, as one vector; `collating` CPU time of a sample."
    )
    lines = [
        "# Packed batches against padded ones",
        "",
        made_with(command),
        "",
        fill(about, WIDTH),
        "",
        *lines_of(COLUMNS, rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
