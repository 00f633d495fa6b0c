"""python -m benchmarks.gpu.results FILE ...: reads what `make gpu` recorded.

Prints what failed, then what was measured. `--write` makes dated results of it under
benchmarks/results/, from which `python -m benchmarks.readme` makes the README's table; `--tiles`
puts the sweep's proposals into the tile tables. Both refuse a rehearsal and a commit that nobody
can check out; a person reads the difference and commits it.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks.__main__ import make_console
from benchmarks.gpu.reporting import report, sessions, tables, tile_tables
from benchmarks.gpu.reporting.sessions import Session
from benchmarks.gpu.reporting.tile_tables import Refused


def write(some: list[Session], console: Console) -> None:
    """Writes dated results of every session, or of none."""
    for session in some:
        if reasons := session.refusals():
            raise Refused("\n".join(reasons))
    for session in some:
        paths, left = tables.write(session, tables.RESULTS)
        for path in paths:
            console.print(Text(f"wrote {path}"))
        if left:
            console.print(f"{left} rows that failed, disagree or have no number were left out")
    console.print("next: python -m benchmarks.readme")


def write_tiles(some: list[Session], console: Console) -> None:
    """Writes rows of the tile tables and prints what changed in them."""
    found = tile_tables.proposals(some)
    for op, path in tile_tables.FILES.items():
        before = path.read_text(encoding="utf-8")
        after, left = tile_tables.rewritten(before, [p for p in found if p.op == op])
        path.write_text(after, encoding="utf-8")
        name = f"{op}/{path.name}"
        difference = difflib.unified_diff(
            before.splitlines(), after.splitlines(), name, name, lineterm="", n=1
        )
        for line in [*difference, *(f"left alone: {x}" for x in left)]:
            console.print(Text(line), soft_wrap=True)
    console.print("next: make lint aot; the comment above each table says what its rows are")


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if there is nothing to read or something is refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.results", description=__doc__)
    parser.add_argument("file", nargs="+", type=Path, help="results.jsonl of one call or more")
    parser.add_argument("--write", action="store_true", help="dated results")
    parser.add_argument("--tiles", action="store_true", help="rows of the tile tables")
    args = parser.parse_args(arguments)
    if absent := [str(path) for path in args.file if not path.is_file()]:
        parser.error(f"no file {', '.join(absent)}")
    console = make_console()
    some, wrong = sessions.read(args.file)
    for sentence in wrong:
        console.print(Text(sentence), style="yellow")
    for session in some:
        report.show(session, console)
    asked = ((args.write, write), (args.tiles, write_tiles))
    try:
        for wanted, make in asked:
            if wanted:
                make(some, console)
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    return 0 if some else 1


if __name__ == "__main__":
    sys.exit(main())
