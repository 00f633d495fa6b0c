"""python -m benchmarks: our ops beside the floor, what people write today, and what they could
install. python -m benchmarks training_step: whole steps of fine-tuning, with grounding and
without. python -m benchmarks longest: the longest sample that one device trains on."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import choosing, problems
from benchmarks.figures import scaling, table
from benchmarks.timing import machine, results, suite
from benchmarks.timing.results import Row


def make_console() -> Console:
    """A console; wide if the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 150)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("op", nargs="*", help=f"of {', '.join(problems.OPS)}; all by default")
    p.add_argument(
        "--backend",
        nargs="+",
        default=["auto"],
        choices=["auto", "reference", "triton", "native"],
        help="of ours; the first is what the others are compared with",
    )
    choosing.add_arguments(p.add_argument)
    p.add_argument("--seconds", type=float, default=5.0, help="of timing per problem")
    p.add_argument("--least", type=int, default=5, help="rounds, however long they take")
    p.add_argument("--deadline", type=float, help="seconds after which no problem is started")
    p.add_argument("--no-memory", action="store_true")
    p.add_argument("--quick", action="store_true", help="tiny shapes, three rounds: a smoke test")
    p.add_argument("--csv", type=Path)
    p.add_argument("--plot", type=Path, metavar="DIR")
    return p


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with --quick spelled out."""
    p = parser()
    args = p.parse_args(arguments)
    unknown = sorted(set(args.op) - set(problems.OPS))
    if unknown:
        p.error(f"argument op: expected some of {', '.join(problems.OPS)}, got {unknown[0]!r}")
    if args.quick:
        args.shape, args.seconds, args.least = [problems.QUICK], 0.0, 3
        args.no_compile = args.no_memory = True
        args.threads = args.threads or 1  # work is tiny: a second thread would only wait
    return args


def run(args: argparse.Namespace, console: Console) -> tuple[list[Row], list[str]]:
    """Measures and prints; files are written after each problem, so that they survive an interrupt.

    Returns the rows with their stamp, and the names of what the deadline left out.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtypes = [getattr(torch, name) for name in args.dtype]
    some = choosing.chosen(args, args.op or list(problems.OPS))
    stamp = machine.stamp(device)
    console.print(", ".join(f"{name} {value}" for name, value in stamp.items() if value))
    ceilings = machine.ceilings(device, dtypes) if device.type == "cuda" else {}
    for name, value in ceilings.items():
        unit = "TB/s copied" if name == "bandwidth" else "TFLOP/s matmul"
        console.print(f"{name}: {value / 1e12:.4g} {unit}, measured now")
    rows: list[Row] = []
    left_out: list[str] = []
    for new in suite.suite(
        some,
        args.mode,
        device,
        deadline=args.deadline,
        left_out=left_out,
        backends=args.backend,
        compiled=not args.no_compile,
        with_memory=not args.no_memory,
        seconds=args.seconds,
        least=args.least,
        ceilings=ceilings,
    ):
        table.show(new, console)
        rows += [{**row, **stamp} for row in new]
        if args.csv:
            results.write(args.csv, rows, left_out)
    if args.csv:
        results.write(args.csv, rows, left_out)
    scaling.show(rows, console)
    for name in left_out:
        console.print(f"left out by the deadline: {name}", style="yellow")
    for line in results.failures(rows):
        console.print(line, style="red")
    return rows, left_out


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a contestant crashed or disagreed with ours."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["training_step"]:
        from benchmarks.training_step import step as training_step

        return training_step.main(arguments[1:])
    if arguments[:1] == ["longest"]:
        from benchmarks.longest import __main__ as longest

        return longest.main(arguments[1:])
    args = parse(arguments)
    console = make_console()
    rows, _ = run(args, console)
    if args.plot and rows:
        from benchmarks.figures import plots

        for path in plots.draw(rows, args.plot):
            console.print(f"drew {path}")
    return 1 if results.failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
