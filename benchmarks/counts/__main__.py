"""python -m benchmarks.counts: costs of a call that do not vary from run to run.

Of our CPU calls at issue-5's sizes: FLOPs of the matrix products that linear cross entropy asks
for, and bytes touched at the peak of a call (as timing/memory.py counts them). If valgrind is
installed, machine instructions of the C++ kernels at smaller sizes (instructions.py). If Triton is
installed, the kernels that a call launches on a GPU (benchmarks/launches). They are compared with
counts.json, which is committed: more than it says fails, fewer asks for `--write`. Times are never
compared.
"""

import argparse
import importlib.util
import json
import shutil
import sys

from benchmarks.counts.counting import (
    FILE,
    changes,
    committed,
    comparable,
    instructions,
    launches,
    measured,
    now,
)


def main() -> int:
    """Returns 1 if a count grew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="commit what is measured now to counts.json"
    )
    parser.add_argument("--measure", action="store_true", help="print the counts as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(dict(measured())))
        return 0
    new, old = now(), committed() if FILE.exists() else {}
    if shutil.which("valgrind"):
        new |= instructions()
    else:
        print("valgrind is not installed: instructions are not counted", file=sys.stderr)
        new |= {name: counts for name, counts in old.items() if name.startswith("counted/")}
    if importlib.util.find_spec("triton"):
        new |= launches()
    else:
        print("triton is not installed: launches are not counted", file=sys.stderr)
        new |= {name: counts for name, counts in old.items() if name.startswith("gpu/")}
    others = [n for n in old if not all(comparable(n, kind) for kind in old[n])]
    if others:
        said = f"not compared, as this processor does not multiply bf16: {', '.join(others)}"
        print(said, file=sys.stderr)
        new |= {name: old[name] for name in others}
    if args.write:
        FILE.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
        return 0
    worse, better = changes(new, old)
    for sentence in worse:
        print(f"more: {sentence}", file=sys.stderr)
    for sentence in better:
        print(f"fewer: {sentence}; commit it with python -m benchmarks.counts --write")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
