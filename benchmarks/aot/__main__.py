"""`python -m benchmarks.aot [--subset]`: compiles every Triton kernel for GPUs that are not here.

Each op's launchers run on meta tensors and a recorder takes the place of the launch, so that what
is compiled is what would be launched: rows of the tile tables, dtypes, constexprs, and arguments
specialised as the runtime does. Edge launches (rows=1, unaligned, ...) are compiled in bf16 alone.
Their machine code is read only with --only, because the disassembler takes as long as the compiler;
with --subset each is compiled for one target.

Prints registers and spills of a thread, shared memory, and of each kernel's main loop (the
innermost with the matrix instructions): instructions, barriers, loads from global memory as bits x
count, asynchronous copies / groups of them in flight at the wait, local memory, matrix instruction.
Exits with 1 on a spill, on a 16-bit dot without a matrix instruction, on shared memory over the
target's limit, on sums in 16 bits, on a kernel that does not compile, or on a 16-bit attention
kernel on sm_90 with fewer than 32 columns in a wgmma or fewer than two copies in flight
(`wanted.py`); with --check FILE also if one is worse than the file says or has more variants
(`table.py`). None of this measures speed.

Spills of fp32 kernels with dots are printed and allowed. These dots are exact (ieee), for which
NVIDIA has no matrix instruction: every thread multiplies out of registers. At head dimension 128
even the smallest tile, 16 rows by the 32 keys of one group of mask bits, spills with 4, 8 and 16
warps. fp32 is only there to be compared with.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.aot import table
from benchmarks.aot.compiling import TARGETS, compiled, in_processes
from benchmarks.aot.edges import OF_AMD
from benchmarks.aot.launches import Variants, launches, variants
from benchmarks.aot.recorder import LabelledLaunch, triton

HEADER = (
    f"{'':33}{'':25}  main loop\n{'target':8}{'kernel':25}{'regs':>5}{'shared':>8}{'spills':>7}"
    f"{'instr':>7}{'bars':>5}{'copies':>8}{'local':>6}  loads / matrix / call"
)


def selected(options: argparse.Namespace) -> Iterator[tuple[LabelledLaunch, str, bool]]:
    """(launch, target, whether to read the machine code); each piece of code once."""
    seen: set[str] = set()
    only = re.compile(re.escape(options.only) + r"(?!\d)" * options.only[-1:].isdigit())
    for launch in launches(options.subset):
        if not only.search(f"{launch.label} {launch.kernel.__name__}"):
            continue
        for target in options.target or TARGETS:
            if TARGETS[target].kind != launch.kind:
                continue
            of = "gfx942" if OF_AMD in launch.label else "sm_90"
            if options.subset and launch.edge and target != of:
                continue
            key = f"{target} {launch.key(TARGETS[target].gpu)}"
            if key not in seen:
                seen.add(key)
                yield launch, target, bool(options.only) or not launch.edge


def line(launch: LabelledLaunch, target: str, got: dict[str, object]) -> str:
    """One kernel, in columns."""
    head = f"{target:8}{launch.name:25}"
    head += "".join(
        f"{got.get(k, '-'):>{n}}" for k, n in zip(("registers", "shared", "spills"), (5, 8, 7))
    )
    loop, matrix = got.get("loop"), got["matrix"]
    if loop is None:
        why = "no loop" if "loop" in got else ""
        return f"{head}{why:>26}  {matrix} / {launch.label}"
    flight = "-" if loop["in_flight"] is None else loop["in_flight"]
    copies = f"{loop['copies']}/{flight}" if loop["copies"] else "-"
    loads = " ".join(f"{width}x{count}" for width, count in loop["loads"].items()) or "no load"
    matrix = ", ".join(f"{what} x{count}" for what, count in loop["matrix"].items()) or matrix
    counts = f"{loop['instructions']:>7}{loop['barriers']:>5}{copies:>8}{loop['local']:>6}"
    return f"{head}{counts}  {loads} / {matrix} / {launch.label}"


def printed(found: dict[str, Variants]) -> dict[str, int]:
    """Prints and returns how many variants of each kernel there are."""
    counts = {name: x.count for name, x in found.items()}
    fixed = sum(x.of_one_size for x in found.values())
    print(f"{sum(counts.values())} variants for 60 random sizes, {fixed} for one size; more by:")
    for name, x in found.items():
        if x.count > x.of_one_size:
            print(f"  {name}: {x.of_one_size} -> {x.count} by {', '.join(x.arguments)}")
    return counts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subset", action="store_true", help="bf16 at head dimension 128, edges")
    parser.add_argument("--only", default="", help="launches whose label or kernel contains this")
    parser.add_argument("--no-edges", action="store_true", help="leave the edge launches out")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with a --write")
    parser.add_argument("--write", "--json", type=Path, metavar="FILE", help="what was read")
    parser.add_argument("--variants", action="store_true", help="count them and compile nothing")
    parser.add_argument("--triton", metavar="VERSION", help="fail where another one is imported")
    options = parser.parse_args()
    if options.triton not in (None, triton.__version__):
        where = Path(triton.__file__).parent
        parser.error(f"expected triton {options.triton}, got {triton.__version__} in {where}")
    if options.only and (options.check or options.write):
        parser.error("--check and --write are for all launches: expected no --only")
    return options


def main() -> int:
    options = parse()
    if options.variants:
        printed(variants(TARGETS["sm_90"].gpu))
        return 0
    committed = table.read(options.check) if options.check else None
    work = [x for x in selected(options) if not (options.no_edges and x[0].edge)]
    print(f"triton {triton.__version__} ({Path(triton.__file__).parent}): {len(work)} kernels")
    print(HEADER)
    failures, entries = 0, {target: {} for target in options.target or TARGETS}
    for (launch, target, read), got in zip(work, in_processes(compiled, work, options.jobs)):
        print(line(launch, target, got), flush=True)
        if got["failure"]:
            failures += 1
            print(f"  FAIL: {got['failure']}", flush=True)
        elif read:
            facts = {x: got[x] for x in ("registers", "shared", "spills", "local", "loop")}
            name = f"{launch.name} / {launch.label}"
            table.add(entries, target, name, {**facts, "tile": launch.tile})
    print(f"{failures} failures")
    if failures:
        return 1
    if not options.check and not options.write:
        return 0
    counts = printed(variants(TARGETS["sm_90"].gpu))
    if options.write:
        table.write(options.write, triton.__version__, entries, counts)
    if committed is None:
        return 0
    return int(table.check(committed, triton.__version__, entries, counts) > 0)


if __name__ == "__main__":
    sys.exit(main())
