"""python -m benchmarks.gpu.steps.worker STEP: runs the cases of one step and records each.

The supervisor starts it, and again if it dies; cases that have begun are not tried again. A case
that takes too long is ended by `faulthandler`, which works while Python waits inside CUDA and
writes every thread's traceback to the log.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import lines
from benchmarks.gpu.devices.device import Device, DeviceLost, Gpu
from benchmarks.gpu.devices.stand_in import PLAYED, StandIn
from benchmarks.gpu.supervising import inject, schedule
from benchmarks.gpu.supervising.clock import Clock, PlayedClock

MODULES = {  # step -> the module with its `cases`
    "compile": "compiling",
    "ceilings": "ceilings",
    "smoke": "smoke",
    "compile_tiles": "compiling",
    "replay": "timing",
    "loss": "timing",
    "tiles": "sweep",
    "peers": "peers",
    "training_step": "training",
}
Cases = Iterator[tuple[str, Callable[[], None]]]


@dataclass
class Context:
    """What a step works with.

    until: seconds on the clock after which no case begins. few: the most cases, in a short
    rehearsal.
    """

    step: schedule.Step
    device: Device
    clock: Clock
    lines: lines.Lines
    scratch: Path
    until: float
    few: int | None = None

    def write(self, event: str, **fields: object) -> None:
        self.lines.write(event, **fields)

    def before(self) -> list[lines.Line]:
        """Everything on record so far."""
        return lines.read(self.lines.path)[0]

    def left(self) -> float:
        return self.until - self.clock.now()


def run(context: Context, cases: Cases, injected: inject.Injected) -> int:
    """0 if every case ended, whatever it found; `schedule.LOST` if a new process has to go on."""
    before = context.before()
    done = lines.started(before, context.step.name)
    # A rehearsal's interpreter is slow: there only a case that is meant to hang is ended.
    plain = None if context.device.rehearsed else context.step.case_limit
    left_out = 0
    for number, (case, body) in enumerate(cases):
        if case in done or (context.few is not None and number >= context.few):
            continue
        if context.left() <= 0:
            left_out += 1
            continue
        context.write("start", case=case)
        limit = injected.limit(number) or plain
        if limit is not None:
            faulthandler.dump_traceback_later(limit, exit=True)
        began = context.clock.now()
        try:
            injected.before(number, case)
            body()
            context.device.settle()
        except Exception as error:
            _write_error(context, case, error)
            if _lost(context, error, injected):
                context.write("done", case=case, seconds=context.clock.now() - began)
                return schedule.LOST
        finally:
            faulthandler.cancel_dump_traceback_later()
        context.write("done", case=case, seconds=round(context.clock.now() - began, 3))
        context.device.forget()
    if left_out:
        context.write("note", text=f"{left_out} cases were left out: the step's time was over")
    return 0


def _write_error(context: Context, case: str, error: Exception) -> None:
    first = (str(error).strip().splitlines() or [""])[0]
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)
    kind = type(error).__name__
    context.write("error", case=case, kind=kind, message=first[:500], traceback=text[-4000:])


def _lost(context: Context, error: Exception, injected: inject.Injected) -> bool:
    if isinstance(error, DeviceLost) or injected.lost:
        return True
    try:
        context.device.settle()
    except DeviceLost:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.steps.worker", description=__doc__
    )
    parser.add_argument("step", choices=MODULES)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--elapsed", type=float, required=True, help="seconds since the run began")
    parser.add_argument("--until", type=float, required=True, help="no case begins after this")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--few", type=int)
    parser.add_argument("--inject", action="append", default=[], metavar="STEP[#CASE]=KIND")
    args = parser.parse_args()
    faulthandler.enable()
    clock = PlayedClock(args.elapsed) if args.rehearse else Clock(args.elapsed)
    injected = inject.Injected([x for x in map(inject.parse, args.inject) if x.step == args.step])
    injected.at_start()
    device: Device
    if args.rehearse:
        torch.set_num_threads(1)
        device = StandIn(clock, injected.spoils)
        clock.spend(PLAYED["start"])
    elif MODULES[args.step] == "compiling":
        device = Device(clock)  # compiles for the GPU without opening it
    else:
        device = Gpu(clock)
    record = lines.Lines(args.lines, args.step, clock.now)
    step = schedule.STEPS[args.step]
    context = Context(step, device, clock, record, args.scratch, args.until, args.few)
    module = importlib.import_module(f"benchmarks.gpu.steps.{MODULES[args.step]}")
    return run(context, module.cases(context), injected)


if __name__ == "__main__":
    sys.exit(main())
