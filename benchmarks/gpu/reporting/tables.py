"""Dated results of a session of `make gpu`, under benchmarks/results/."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from benchmarks.gpu.reporting.failures import steps
from benchmarks.gpu.reporting.sessions import Session, is_timed, outcome
from benchmarks.gpu.reporting.tile_tables import Refused, card
from benchmarks.timing import results
from benchmarks.timing.results import Row

RESULTS = Path(__file__).parents[2] / "results"
SHOWN = ("refused", "out of memory")  # statuses that are shown beside rows with a time
HEAD = "| file | what ran | rerun |"


def shown(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(rows for the committed table; those that failed, disagree or have no number)."""
    good = [r for r in rows if is_timed(r) or outcome(r) in SHOWN]
    return good, [r for r in rows if r not in good]


def stem_of(session: Session, folder: Path) -> str:
    """DATE-CARD, with the commit behind it if that name belongs to results of another commit."""
    last = session.last
    name = f"{last.date[:10]}-{card(last.card).lower().replace(' ', '-')}"
    path = folder / f"{name}.csv"
    taken = path.exists() and results.read(path)[0]["commit"] != last.commit
    return f"{name}-{last.commit[:7]}" if taken else name


def write(session: Session, folder: Path = RESULTS) -> tuple[list[Path], int]:
    """(the files written, how many rows were left out).

    Raises:
        Refused: what was measured may not become a result.
    """
    if reasons := session.refusals():
        raise Refused("\n".join(reasons))
    good, bad = shown(session.rows())
    if not any(map(is_timed, good)):
        raise Refused(f"{session.last.path.name}: no row with a time")
    stem = stem_of(session, folder)
    paths = [folder / f"{stem}.csv"]
    results.write(paths[0], good, _left_out(session, bad))
    origin = {n: session.last.stamp[n] for n in ("device", "commit", "date")}
    parts = {"kernels": _kernels, "tiles": _tiles, "smoke": _smoke}
    for name, part in parts.items():
        if rows := [{**row, **origin} for row in part(session)]:
            paths.append(folder / f"{stem}-{name}.csv")
            results.write(paths[-1], rows)
    _list(folder / "README.md", stem, _described(session, good, paths))
    return paths, len(bad)


def _left_out(session: Session, bad: list[Row]) -> Iterator[str]:
    for call in session.calls:
        for name, end in steps(call).items():
            if end.get("status") != "done":
                yield f"{call.name}, step {name}: {end.get('status', 'cut')}"
    for r in bad:
        yield f"{r['problem']}/{r['dtype']}/{r['mode']}, {r['contestant']}: {r['status']}"


def _kernels(session: Session) -> Iterator[Row]:
    for x in session.latest("kernel", "case", "mode", "kernel"):
        yield {n: x.get(n) for n in ("case", "mode", "kernel", "calls", "us")}


def _tiles(session: Session) -> Iterator[Row]:
    """Every tile that was tried, with its last timing; chosen: whether the sweep proposes it."""
    best = [(x["op"], x["key"], x["tile"]) for x in session.latest("best", "op", "key")]
    for x in session.latest("tile", "op", "key", "tile"):
        row: Row = {"op": x["op"]}
        row |= zip(("kernel", "wide", "dim", "packed"), x["key"])
        row |= zip(("block_m", "block_n", "warps", "stages", "registers"), x["tile"])
        row |= {n: x.get(n) for n in ("present", "round", "us")}
        status = " ".join(str(x["status"]).split())[:200]
        yield row | {"status": status, "chosen": (x["op"], x["key"], x["tile"]) in best}


def _smoke(session: Session) -> Iterator[Row]:
    for x in session.latest("smoke", "case"):
        for check in x["checks"]:
            said = {n: check.get(n) for n in ("name", "error", "allowed", "ok")}
            yield {"case": x["case"], **said}


def _described(session: Session, rows: list[Row], paths: list[Path]) -> str:
    """What ran and how to run it again, as cells of the table of files."""
    names = [call.name for call in session.calls]
    problems = len({(r["problem"], r["dtype"]) for r in rows})
    beside = ", ".join(f"`-{p.stem.rsplit('-', 1)[1]}`" for p in paths[1:])
    what = f"{session.last.card}: {problems} problems, calls {' and '.join(names)}"
    return f"{what}{f'; beside it {beside}' if beside else ''} | `make gpu`"


def _list(readme: Path, stem: str, cells: str) -> None:
    """Puts a line into the table of files; it replaces an older one of the same name."""
    lines = readme.read_text(encoding="utf-8").splitlines()
    at = lines.index(HEAD) + 2
    old = list(takewhile(lambda x: x.startswith("|"), lines[at:]))
    others = [x for x in old if not x.startswith(f"| `{stem}` ")]
    lines[at : at + len(old)] = [*others, f"| `{stem}` | {cells} |"]
    readme.write_text("\n".join(lines) + "\n", encoding="utf-8")
