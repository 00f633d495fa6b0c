"""What a run and a prepare command leave behind and read back: whole, or refused in a sentence."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from groundkern.trainer import checkpoints, run_folder
from groundkern.trainer.command_line import load_config
from groundkern.trainer.config import Config
from groundkern.trainer.data import index as data_index
from groundkern.trainer.prepare.output import Output
from tests.fuzz.scratch import folder, written
from tests.fuzz.target import Target, expect

SETTINGS = {"command": "words", "input": {"file": "a.jsonl", "bytes": 3}}


def check_metrics(data: bytes) -> bool:
    """Rows of metrics.jsonl: those that are whole, in order."""
    written(f"run/{run_folder.METRICS}", data)
    rows = run_folder.read_metrics(folder() / "run")
    expect(all(isinstance(row, dict) for row in rows), "objects", rows)
    whole = [line for line in data.split(b"\n")[:-1] if line.strip()]
    expect(len(rows) <= len(whole), f"at most {len(whole)} rows", len(rows))
    return bool(rows)


@cache
def _config() -> Config:
    text = "model: {path: m}\ndata: {train: t.jsonl}\ntraining: {output: %s, steps: 3}\n"
    path = written("run.yaml", (text % (folder() / "resumed")).encode())
    return load_config(path, [])


def check_checkpoint(data: bytes) -> bool:
    """A checkpoint's record: the checkpoint is taken, or refused in a sentence."""
    checkpoint = folder() / "resumed" / "checkpoint-3"
    written(f"resumed/checkpoint-3/{run_folder.RECORD}", data)
    if (reason := checkpoints.fault(checkpoint)) is not None:
        expect(isinstance(reason, str) and bool(reason.strip()), "a reason", reason)
    found = checkpoints.find(_config())
    expect(found == checkpoint and reason is None, "the checkpoint, if it is whole", found, reason)
    counts = checkpoints.read_counts(found)
    expect(isinstance(counts, Counter), "counts", counts)
    return True


def check_index(data: bytes) -> bool:
    """The kept index of a data file: as it was written, or none."""
    found = data_index.kept(written("kept.index", data), {"root": "r"}, "0" * 64)
    if found is None:
        return False
    expect(data == _seed_of_index(), "nothing but what was written", data[:80])
    expect(found.good["number"].tolist() == [1, 3] and found.tasks == ["a"], "the rows", found)
    return True


@cache
def _seed_of_index() -> bytes:
    good = np.zeros(2, data_index.ENTRY)
    good["number"] = 1, 3
    index = data_index.Index("0" * 64, good, ["a"], np.array([[2, 70]]))
    data_index.keep(folder() / "kept.index", index, {"root": "r"})
    return (folder() / "kept.index").read_bytes()


def check_output(data: bytes) -> bool:
    """The record of a prepare command that was interrupted: continued from, or refused."""
    path = folder() / "out" / "o.jsonl"
    written("out/o.jsonl.partial", b'{"a": 1}\n')
    written("out/o.jsonl.rejected.jsonl.partial", b"")
    for name in ("o.jsonl", "o.jsonl.rejected.jsonl"):
        (path.parent / name).unlink(missing_ok=True)
    written("out/o.jsonl.prepare.json", data)
    with Output(path, SETTINGS) as out:
        counts = (out.inputs, out.samples, out.rejected)
        expect(all(type(n) is int and n >= 0 for n in counts), "counts", counts)
        expect(isinstance(out.finished, bool), "finished or not", out.finished)
        if not out.finished:
            sizes = [Path(f"{p}.partial").stat().st_size for p in (out.path, out.rejects)]
            expect(sizes[0] in (0, 9) or sizes[0] <= 9, "no more bytes than there were", sizes)
    return True


def _seed_of_output() -> bytes:
    state = {"settings": SETTINGS, "inputs": 1, "samples": 1, "rejected": 0, "finished": False}
    return json.dumps({**state, "counts": {"words": 3}, "bytes": [9, 0]}).encode()


def _seed_of_checkpoint() -> bytes:
    checkpoint = folder() / "resumed" / "checkpoint-3"
    written("resumed/checkpoint-3/model.safetensors", b"weights")
    checkpoints.seal(checkpoint, _config(), train_digest="0" * 64, counts=Counter(samples=3))
    return (checkpoint / run_folder.RECORD).read_bytes()


METRICS = {
    "three": b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25, "text": 1}\n{"step": 3}\n',
    "cut": b'{"step": 1, "loss": 2.5}\n{"step": 2, "lo',
}
TARGETS = (
    Target("metrics", check_metrics, METRICS, "jsonl", ("step", "loss"), 1),
    Target("checkpoint", check_checkpoint, {"record": _seed_of_checkpoint()}, "json", ("config",),
           0.3),
    Target("index", check_index, {"two": _seed_of_index()}, "bytes"),
    Target("prepare_record", check_output, {"record": _seed_of_output()}, "json",
           ("bytes", "inputs", "settings"), 0.5),
)  # fmt: skip
