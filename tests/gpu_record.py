"""Records of `make gpu` calls for tests. Every number is invented: none may become a result."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.timing.results import FIELDS

COMMIT, CARD = "0123456789ab", "NVIDIA H200"
SIDE, SIDE_LONG = "qwen/side_attention/S32768xN8", "qwen/side_attention/S32768xN256"
LOSS = "qwen/linear_cross_entropy_trained/N512xV151936"
GRAPH, EAGER, FLOOR = "groundkern triton, CUDA graph", "groundkern triton", "floor: the GEMMs alone"


class Record:
    """Lines in the order in which they are added; the number of a line is its time."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def add(self, step: str, event: str, **fields) -> Record:
        self.lines.append({"t": float(len(self.lines)), "step": step, "event": event, **fields})
        return self

    def write(self, path: Path, end: str = "") -> Path:
        text = "".join(json.dumps(x) + "\n" for x in self.lines)
        path.write_text(text + end, encoding="utf-8")
        return path


def begun(call: str = "first", date: str = "2026-11-28T10:00:00+00:00", **changed) -> Record:
    """The lines that every call has. changed: fields of the run line, the device line, or both."""
    run = {"call": call, "seconds": 420.0, "commit": COMMIT, "date": date, "rehearsed": False}
    device = {"device": CARD, "processor": "a processor", "threads": 8, "system": "Linux"}
    device |= {"python": "3.12.0", "torch": "2.11.0", "triton": "3.6.0", "groundkern": "0.1"}
    device |= {"commit": COMMIT, "date": date, "multiprocessors": 132}
    run |= {k: x for k, x in changed.items() if k in run}
    device |= {k: x for k, x in changed.items() if k in device}
    record = Record().add("", "run", **run)
    record.add("ceilings", "begin", limit=30.0).add("ceilings", "device", **device)
    for name, value, unit in (("bandwidth", 4e12, "bytes/s"), ("bfloat16", 8e14, "FLOP/s")):
        record.add("ceilings", "ceiling", name=name, value=value, unit=unit)
    return record.add("ceilings", "end", status="done", seconds=4.0, restarts=0)


def row(problem: str, contestant: str, ms: float | str | None, **changed) -> dict:
    """A row of results: 1 GB to move and 8 GFLOP to compute, so that bytes decide the floor."""
    found: dict = dict.fromkeys(FIELDS)
    kinds = {GRAPH: "ours", EAGER: "ours", FLOOR: "floor"}
    kind = kinds.get(contestant, "gemm" if contestant.startswith("GEMM") else "baseline")
    found |= {"op": problem.split("/")[1].removesuffix("_trained"), "problem": problem}
    found |= {"shape": "some sizes", "dtype": "bfloat16", "mode": "full", "rows": 8, "keys": 32768}
    found |= {"columns": 0, "vocabulary": 0, "swept": "", "contestant": contestant, "kind": kind}
    found |= {"status": "timed", "rounds": 20, "floor_bytes": 10**9, "floor_flops": 8 * 10**9}
    found |= {"bandwidth": 4e12, "matmul_rate": 8e14, "floor_ms": 0.25, "load": 1.0}
    if ms is not None:
        found |= {f"{p}_ms": ms for p in ("p20", "p50", "p80")}
        percent = float(f"{25 / ms:.3g}") if isinstance(ms, float) else "nan"
        found |= {"percent_of_floor": percent, "to_gemms_p50": 1.3}
    return found | changed


def measured(record: Record, case: str, found: list[dict], step: str = "replay") -> Record:
    for one in found:
        record.add(step, "row", case=case, row=one)
    return record


def best(record: Record, op: str, key: list, tile: list, us: float, present: list, was: float):
    """A proposal, with its two tiles' timings."""
    for t, x in ((present, was), (tile, us)):
        record.add("tiles", "tile", op=op, key=key, tile=t, present=t == present, round="final",
                   us=x, status="timed", kernels={"forward_kernel": x})  # fmt: skip
    return record.add(
        "tiles", "best", op=op, key=key, tile=tile, us=us, present_tile=present, present_us=was
    )


def first() -> Record:
    """A first call in which every kind of thing went wrong."""
    record = begun()
    record.add("smoke", "begin", limit=75.0)
    checks = [{"name": "result 0", "error": 0.001, "allowed": 0.01, "ok": True}]
    record.add("smoke", "smoke", case="good", ok=True, checks=checks)
    bad = {"name": "dq", "error": "nan", "allowed": 0.01, "ok": False}
    record.add("smoke", "smoke", case="bad one", ok=False, checks=[*checks, bad])
    for case in ("first case", "second case"):
        record.add("smoke", "error", case=case, kind="CompilationError", message="at 5:6",
                   traceback="Traceback\n  File\nCompilationError: no int.to")  # fmt: skip
    record.add("smoke", "end", status="failed", seconds=30.0, restarts=2)
    record.add("replay", "begin", limit=95.0)
    replays = [row(SIDE, FLOOR, 0.2), row(SIDE, GRAPH, 0.3125), row(SIDE, EAGER, 0.55)]
    measured(record, SIDE, replays)
    far = {"floor_flops": 2 * 10**12, "floor_ms": 2.5, "percent_of_floor": 39.0}
    measured(record, SIDE_LONG, [row(SIDE_LONG, GRAPH, 4.6, **far), row(SIDE_LONG, EAGER, None,
             status="failed: CUDA error")])  # fmt: skip
    for name, calls, us in (("forward_kernel", 1.0, 50.0), ("dkv_kernel", 2.0, 150.0)):
        record.add("replay", "kernel", case=SIDE, mode="full", kernel=name, calls=calls, us=us)
    record.add("replay", "end", status="done", seconds=80.0, restarts=0)
    gemms = {"GEMM logits": 0.4, "GEMM dhidden": 0.41, "GEMM dweight": 0.42}
    sizes = {"rows": 512, "vocabulary": 151936, "floor_flops": 10**12}
    loss = [row(LOSS, GRAPH, 1.3, to_gemms_p50=1.04, **sizes)]
    measured(record, LOSS, loss + [row(LOSS, g, x, **sizes) for g, x in gemms.items()], "loss")
    best(record, "side_attention", ["dq", False, 128, 16], [16, 64, 4, 3, None], 10.0,
         [64, 32, 4, 2, None], 12.5)  # fmt: skip
    record.add("tests", "begin", limit=150.0)
    for name, outcome in (("a[x]", "passed"), ("b[y]", "failed"), ("c", "skipped")):
        text = "def test():\nE   AssertionError: 1 != 2" if outcome == "failed" else ""
        record.add(
            "tests", "test", test=f"tests/t.py::{name}", outcome=outcome, seconds=1, text=text
        )
    record.add("tests", "end", status="timed out", seconds=150.0, restarts=0)
    return record.add("tests_large", "end", status="left out", seconds=0, restarts=0)


def second(**changed) -> Record:
    """A second call: one problem again, and beside plain torch."""
    record = begun("second", "2026-11-28T12:00:00+00:00", **changed)
    measured(record, SIDE, [row(SIDE, GRAPH, 0.29), row(SIDE, EAGER, 0.5)])
    others = [row(SIDE, "SDPA", 0.6, ours_over_this_p50=0.8),
              row(SIDE, "plain torch", 1.0, ours_over_this_p50=0.5),
              row(SIDE, "a peer", None, status="refused: head dimension", kind="peer")]  # fmt: skip
    return measured(record, SIDE, others, "peers")
