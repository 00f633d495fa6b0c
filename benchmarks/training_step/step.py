"""python -m benchmarks training_step: what grounding adds to a step of supervised fine-tuning.

Time and peak memory of forward and backward (without an optimizer, which costs everyone the same)
of one sample at growing lengths, and the longest sample whose step fits in a given amount of
memory.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.contestants import admission
from benchmarks.timing import machine, memory, processes, results, rounds, suite
from benchmarks.timing.results import Row
from benchmarks.training_step.losses import (
    EAGER,
    EQUALS,
    NAMES,
    OURS,
    SKIPPING,
    eager_attention,
    losses,
)
from benchmarks.training_step.model import LEAST, SHAPES, Rows, adapted, build, sample
from groundkern.hf import DvSft, Klal, Smam, attach

FIELDS = (
    *("op", "problem", "shape", "rows", "tokens", "dtype", "lora", "checkpointing", "contestant"),
    *("kind", "status", "rounds", "p20_ms", "p50_ms", "p80_ms"),
    *("to_skipping_p20", "to_skipping_p50", "to_skipping_p80"),
    *("cpu_p20_ms", "cpu_p50_ms", "cpu_p80_ms"),
    *("cpu_to_skipping_p20", "cpu_to_skipping_p50", "cpu_to_skipping_p80"),
    *("peak_mib", "memory_to_skipping", "memory_counts", "cap_gib", "longest", "load"),
)
STEP = "benchmarks.training_step.step"  # this module, in a process of its own
TERMS = {"smam": Smam(), "dv_sft": DvSft(), "klal": Klal()}
GRAIN = 64  # tokens: the search for the longest sample goes no finer
ROOM = 8 * 2**30  # bytes of address space that a CPU process may use beyond the cap
Run = Callable[[], tuple[list[Tensor], list[Tensor]]]


def runner(model: nn.Module, name: str, loss_of: Callable[[], Tensor]) -> Run:
    """A step that returns the loss and the gradients, which count as its memory."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[list[Tensor], list[Tensor]]:
        for p in trained:  # a step that ran out of memory may have left some
            p.grad = None
        with eager_attention(base) if name == EAGER else contextlib.nullcontext():
            loss = loss_of()
            loss.backward()  # inside, because checkpointing runs layers again
        gradients = [p.grad for p in trained if p.grad is not None]
        for p in trained:
            p.grad = None
        return [loss.detach()], gradients

    return run


def disagreement(got: tuple[list, list], wanted: tuple[list, list], dtype: torch.dtype) -> str:
    """Like `admission.disagreement`, but all gradients count as one vector: some, such as those of
    key biases, are nothing but rounding."""
    wrong = admission.disagreement((got[0], []), (wanted[0], []), dtype)
    pairs = list(zip(got[1], wanted[1], strict=True))
    off = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs) ** 0.5
    size = sum(float(b.float().square().sum()) for _, b in pairs) ** 0.5
    allowed = admission.TOLERANCE[dtype]
    if not wrong and not off <= allowed * size:
        return f"gradients are {off / size:.1e} away ({allowed:.0e} allowed)"
    return wrong


def contestants(
    settings: argparse.Namespace, length: int, names: tuple[str, ...] = NAMES
) -> list[admission.Contestant]:
    """The contestants in `names`, each run once; one that disagrees with its equal is not timed."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    shape = SHAPES[settings.shape]
    model = build(shape, device, dtype)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    attach(model, **TERMS)
    if settings.lora:
        model = adapted(model, settings.lora)
        model.enable_input_require_grads()
    batch = sample(shape, length, Rows(), device)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    found: dict[str, admission.Contestant] = {}
    for name, loss_of in losses(model, batch).items():
        kind = "ours" if name in OURS else "baseline"
        if name in names:
            found[name] = admission.Contestant(name, kind, runner(model, name, loss_of))
    for name in [*found]:
        try:
            found[name].run()
        except (torch.OutOfMemoryError, MemoryError):
            found[name] = replace(found[name], run=None, status="out of memory")
    for name, equal in EQUALS.items():
        if all(n in found and found[n].run for n in (name, equal)):
            wrong = disagreement(found[name].run(), found[equal].run(), dtype)
            if wrong:
                found[name] = replace(found[name], run=None, status=f"disagrees: {wrong}")
    return list(found.values())


class Clock:
    """The wall clock that `rounds.interleave` needs; notes CPU seconds of the process beside it."""

    def __init__(self, device: torch.device) -> None:
        self.wall = rounds.cuda_timer(device) if device.type == "cuda" else rounds.cpu_timer
        self.cpu: dict[Run, list[float]] = {}

    def __call__(self, run: Run) -> float:
        start = time.process_time()
        seconds = self.wall(run)
        self.cpu.setdefault(run, []).append(time.process_time() - start)
        return seconds


def peaks(settings: argparse.Namespace, length: int, names: tuple[str, ...] = NAMES) -> dict:
    """Peak bytes of a step beyond weights and inputs, by name; without those that do not fit."""
    found = contestants(settings, length, names)
    return memory.of_contestants(found, torch.device(settings.device))


def longest(settings: argparse.Namespace, name: str, cap: int) -> int:
    """Tokens of the longest sample whose step stays within `cap` bytes, found to a sixteenth; 0 if
    none does."""

    def fits(length: int) -> bool:
        peak = peaks(settings, length, (name,)).get(name)
        return peak is not None and peak <= cap

    low, high = 0, LEAST
    while high <= settings.most_tokens and fits(high):
        low, high = high, 2 * high
    while low and high - low > max(GRAIN, low // 16):
        middle = (low + high) // 2 // GRAIN * GRAIN
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest_of_each(settings: argparse.Namespace) -> dict[str, int]:
    """`longest` by name, within `settings.cap_gib`."""
    cap = int(settings.cap_gib * 2**30)
    if settings.device == "cpu":  # end the process before it takes the machine down
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (cap + ROOM, cap + ROOM))
    return {name: longest(settings, name, cap) for name in NAMES}


def apart(settings: argparse.Namespace, length: int | None) -> dict[str, int]:
    """`peaks` at a length, or `longest_of_each` without one; on CPU in a process of its own, and
    empty if the system has no /proc."""
    if settings.device != "cpu":
        return peaks(settings, length) if length else longest_of_each(settings)
    if not memory.RESET.exists():
        return {}
    request = {k: x for k, x in vars(settings).items() if not isinstance(x, Path)}
    arguments = json.dumps([request, length])
    return processes.answer(STEP, arguments, environment=memory.ALLOCATOR)


def measure(settings: argparse.Namespace, length: int, fitting: dict[str, int]) -> list[Row]:
    """Measures one length; returns its rows."""
    device, load = torch.device(settings.device), machine.load()
    found = contestants(settings, length)
    runs = {c.name: c.run for c in found if c.run is not None}
    clock = Clock(device)
    samples = rounds.interleave(runs, clock, seconds=settings.seconds, least=settings.least)
    cpu = {name: clock.cpu[run] for name, run in runs.items()}
    del runs
    if settings.no_memory:
        peak = {}
    elif device.type == "cuda":
        peak = memory.of_contestants(found, device)
    else:
        peak = apart(settings, length)
    rows = []
    for c in found:
        row: Row = dict.fromkeys(FIELDS)
        row |= {"op": "training_step", "problem": f"{settings.shape}/S={length}", "load": load}
        row |= {"shape": str(SHAPES[settings.shape]), "rows": str(Rows()), "tokens": length}
        row |= {"dtype": settings.dtype, "lora": settings.lora, "kind": c.kind, "status": c.status}
        row |= {"checkpointing": settings.checkpointing, "contestant": c.name}
        row |= {"cap_gib": settings.cap_gib, "longest": fitting.get(c.name)}
        if c.name in samples and SKIPPING in samples:
            row["rounds"] = len(samples[c.name])
            for prefix, times in (("", samples), ("cpu_", cpu)):
                three = rounds.quantiles(times[c.name])
                ratio = rounds.ratio(times[c.name], times[SKIPPING])
                for p, x, r in zip(("p20", "p50", "p80"), three, ratio, strict=True):
                    row[f"{prefix}{p}_ms"] = round(x * suite.MILLI, 3)
                    row[f"{prefix}to_skipping_{p}"] = round(r, 4)
        if c.name in peak:
            row["peak_mib"] = round(peak[c.name] / suite.MIB, 2)
            row["memory_counts"] = memory.COUNTS[device.type]
            if SKIPPING in peak:
                row["memory_to_skipping"] = round(peak[c.name] / peak[SKIPPING], 4)
        rows.append(row)
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Prints one length."""
    first = rows[0]
    table = Table(title=f"{first['problem']}  {first['dtype']}", title_justify="left")
    table.add_column("contestant")
    titles = ("ms, p50", "x skipping (p20-p80)", "CPU, x skipping", "peak MiB", "x skipping")
    for title in (*titles, "longest"):
        table.add_column(title, justify="right")
    for r in rows:
        if r["rounds"] is None:
            table.add_row(str(r["contestant"]), str(r["status"]))
            continue
        spread = "{to_skipping_p50:.3f} ({to_skipping_p20:.3f}-{to_skipping_p80:.3f})".format(**r)
        shown = [r[k] for k in ("peak_mib", "memory_to_skipping", "longest")]
        cells = ["" if x is None else f"{x:.5g}" for x in shown]
        cpu = f"{r['cpu_to_skipping_p50']:.3f}"
        table.add_row(str(r["contestant"]), f"{r['p50_ms']:.5g}", spread, cpu, *cells)
    console.print(table)
    console.print(f"{first['rounds']} interleaved rounds; load average {first['load']}\n")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks training_step", description=__doc__)
    p.add_argument("--shape", default="small", choices=SHAPES)
    p.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096])
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--lora", type=int, default=0, metavar="RANK", help="of the decoder's linears")
    p.add_argument("--checkpointing", action="store_true", help="non-reentrant")
    p.add_argument("--cap-gib", type=float, help="also find the longest sample within this memory")
    p.add_argument("--most-tokens", type=int, default=65536, help="of that search")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seconds", type=float, default=30.0, help="of timing per length")
    p.add_argument("--least", type=int, default=5, help="rounds, however long they take")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--no-memory", action="store_true")
    p.add_argument("--csv", type=Path)
    p.add_argument("--plot", type=Path, metavar="DIR")
    return p


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    """Returns 1 if a contestant disagreed."""
    settings = parser().parse_args(arguments)
    console = console or Console(width=None if sys.stdout.isatty() else 130)
    torch.set_num_threads(settings.threads)
    stamp = machine.stamp(torch.device(settings.device))
    console.print(", ".join(f"{name} {value}" for name, value in stamp.items() if value))
    fitting = apart(settings, None) if settings.cap_gib else {}
    rows: list[Row] = []
    for length in settings.tokens:
        new = measure(settings, length, fitting)
        show(new, console)
        rows += [{**row, **stamp} for row in new]
        if settings.csv:
            results.write(settings.csv, rows)
    if settings.plot:
        from benchmarks.figures import plots

        console.print(f"drew {plots.training_step(rows, settings.plot)}")
    return 1 if results.failures(rows) else 0


def answer() -> None:
    """Answers one request of `apart`: prints bytes or tokens as JSON on the last line."""
    request, length = json.loads(sys.argv[1])
    settings = argparse.Namespace(**request)
    torch.set_num_threads(settings.threads)
    print(json.dumps(peaks(settings, length) if length else longest_of_each(settings)))


if __name__ == "__main__":
    answer()
