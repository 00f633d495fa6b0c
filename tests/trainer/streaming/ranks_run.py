"""Runs of two processes on streams and on a mixture, one after another in one launch:

python -m tests.hf.forked tests.trainer.streaming.ranks_run DATA FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from groundkern.trainer.config import Config
from groundkern.trainer.counting import CountingTrainer
from groundkern.trainer.ranks import Ranks, joined
from groundkern.trainer.train import train_by
from tests.trainer.ranks_run import stopped
from tests.trainer.tiny_run import config

BATCH = 2  # samples, of a process


def make_files(data: Path) -> None:
    """The training file of a tiny run cut in two, and as Parquet."""
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:6]), ("b", lines[6:])):
        (data / f"{name}.jsonl").write_text("".join(part))
    rows = [json.loads(line) for line in lines]
    for row in rows:  # a column has values of one type
        answer = row["messages"][-1]
        answer["content"] = [{"type": "text", "text": answer["content"]}]
    pq.write_table(pa.Table.from_pylist(rows), data / "train.parquet", row_group_size=4)


def settings(data: Path, output: Path, kind: str, **training) -> Config:
    """A run of one kind: streamed JSON lines or Parquet, or two files read as one."""
    files = [
        {"path": str(data / "a.jsonl"), "weight": 2.0, "root": str(data)},
        {"path": str(data / "b.jsonl"), "weight": 0.7, "root": str(data)},
    ]
    values = {"train": files, "test": None, "shuffle_buffer": 4}
    given = {"batch_size": BATCH, "accumulation": 1, "keep": 9, "save_every": 2, "workers": 1}
    match kind:
        case "lines":
            values["streaming"] = True
        case "parquet":
            values |= {"train": str(data / "train.parquet"), "streaming": True}
            values["group_by_length"] = True
            given |= {"steps": 3, "workers": 0}
        case "mixture":
            values["group_by_length"] = True
            given |= {"steps": None, "epochs": 2}
    return config(data, output, data=values, training={**given, **training}, objectives={})


def counted(ranks: Ranks, given: Config) -> int:
    """The batches that this process trained in a run."""
    step, batches = CountingTrainer.training_step, []

    def counting(self, *args, **kwargs):
        batches.append(1)
        return step(self, *args, **kwargs)

    CountingTrainer.training_step = counting
    try:
        train_by(ranks, given)
    finally:
        CountingTrainer.training_step = step
    return len(batches)


def main(data: Path, folder: Path) -> None:
    """All runs; what each process saw of them is in `FOLDER/RANK.json`."""
    with joined() as ranks:
        found = {
            kind: counted(ranks, settings(data, folder / kind, kind))
            for kind in ("lines", "parquet", "mixture")
        }
        cut = settings(data, folder / "cut", "lines")
        found["stopped"] = [stopped(ranks, cut, at)["saved"] for at in (3, 5)]
        found["continued"] = counted(ranks, cut)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
