"""`make gpu`, python -m benchmarks.gpu: a call of about seven minutes on a GPU, without install.

Everything goes to $OUT (default: bench_results/gpu) as soon as it is known: results.jsonl, log.txt
and archive.tar.gz. `python -m benchmarks.gpu.results $OUT/results.jsonl` reads them. After what the
first call found is fixed, a second one: `--call second`. Without a GPU: `--rehearse`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.gpu import lines
from benchmarks.gpu.supervising import schedule, timeline
from benchmarks.gpu.supervising.supervisor import RECORD, ROOT, Supervisor
from benchmarks.timing.commit import commit


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    p.add_argument("step", nargs="*", help=f"of {', '.join(schedule.STEPS)}; instead of a call's")
    p.add_argument("--call", choices=schedule.CALLS, default="first")
    p.add_argument("--out", type=Path, help="default: $OUT, else bench_results/gpu")
    p.add_argument("--seconds", type=float, default=schedule.SECONDS, help="of the whole call")
    p.add_argument("--rehearse", action="store_true", help="without a GPU: tiny, a played clock")
    p.add_argument("--few", type=int, help="of a rehearsal: at most so many cases of each step")
    p.add_argument(
        "--inject",
        action="append",
        default=[],
        metavar="STEP[#CASE]=KIND",
        help="a failure of a rehearsal: crash, hang, oom, lost, nan or error",
    )
    return p


def steps_of(args: argparse.Namespace) -> tuple[schedule.Step, ...]:
    """The steps to run, in the schedule's order; ValueError for an unknown one."""
    unknown = sorted(set(args.step) - set(schedule.STEPS))
    if unknown:
        raise ValueError(f"step: expected some of {', '.join(schedule.STEPS)}, got {unknown[0]!r}")
    if not args.step:
        return schedule.CALLS[args.call]
    return tuple(step for name, step in schedule.STEPS.items() if name in args.step)


def gpu_here() -> bool:
    """Whether there is a GPU, according to the driver's tool: this process never opens the
    device."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if every step ended and found nothing wrong."""
    p = parser()
    args = p.parse_args(arguments)
    try:
        steps = steps_of(args)
    except ValueError as error:
        p.error(str(error))
    if (args.inject or args.few is not None) and not args.rehearse:
        p.error("--inject and --few are for --rehearse")
    if not args.rehearse and not gpu_here():
        print("make gpu needs a CUDA device, and nvidia-smi finds none here.", file=sys.stderr)
        return 1
    out = (args.out or Path(os.environ.get("OUT") or ROOT / "bench_results" / "gpu")).resolve()
    supervisor = Supervisor(
        steps,
        out,
        seconds=args.seconds,
        rehearse=args.rehearse,
        few=args.few,
        injected=tuple(args.inject),
    )
    call = args.call if not args.step else " ".join(args.step)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    whole = supervisor.run(call=call, commit=commit(), date=date)
    found, broken = lines.read(out / RECORD)
    print(summary(found))
    for sentence in broken:
        print(sentence)
    return int(not whole or bool(broken) or wrong(found) > 0)


def wrong(found: list[lines.Line]) -> int:
    """How many errors, failed checks and failed tests there are."""
    bad = [x for x in found if x["event"] == "error"]
    bad += [x for x in found if x["event"] == "smoke" and not x["ok"]]
    bad += [x for x in found if x["event"] == "test" and x["outcome"] in ("failed", "error")]
    return len(bad)


def summary(found: list[lines.Line]) -> str:
    """The last lines of output, which are all that a person may see of it."""
    parts = [timeline.table(found), ""]
    for line in found:
        match line["event"]:
            case "smoke" if not line["ok"]:
                bad = [c["name"] for c in line["checks"] if not c["ok"]]
                parts.append(f"WRONG {line['case']}: {', '.join(bad)}")
            case "error":
                where = " ".join(x for x in (line["step"], line["case"]) if x)
                parts.append(f"ERROR {where}: {line['kind']}: {line['message'][:160]}")
            case "test" if line["outcome"] in ("failed", "error"):
                parts.append(f"FAILED {line['test']}")
    parts.append(f"{wrong(found)} things went wrong; results.jsonl has everything")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
