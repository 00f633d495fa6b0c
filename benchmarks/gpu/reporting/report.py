"""The report of a session of `make gpu`: what failed first, then what was measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.gpu.lines import Line
from benchmarks.gpu.reporting import tile_tables
from benchmarks.gpu.reporting.failures import failures, steps
from benchmarks.gpu.reporting.goals import GOALS, goal_of
from benchmarks.gpu.reporting.sessions import (
    EAGER,
    GRAPH,
    Session,
    SuiteCall,
    groups,
    is_timed,
    number,
)
from benchmarks.timing.results import Row

GEMMS = ("GEMM logits", "GEMM dhidden", "GEMM dweight")
KERNELS, NAME = 5, 36  # kernels shown per case, characters of a kernel's name
UNITS = {"bytes/s": (1e-12, "TB/s"), "FLOP/s": (1e-12, "TFLOP/s"), "us": (1.0, "us")}


def form(x: object, style: str = "{:.3g}") -> str:
    """A number as text; text as it is ("nan"); "" for null."""
    known = number(x)
    return style.format(known) if known is not None else "" if x is None else str(x)


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _add(table: Table, *cells: object, style: str | None = None) -> None:
    """Adds cells without rich's markup, because names of tests and kernels have brackets."""
    table.add_row(*(Text(str(x)) for x in cells), style=style)


def show(session: Session, console: Console) -> None:
    """Prints everything, in the order in which a person would ask."""

    def say(text: str, style: str | None = None) -> None:
        console.print(Text(text), style=style, highlight=False)

    last = session.last
    say(f"{last.card}, commit {last.commit}", "bold")
    for call in session.calls:
        _head(call, say)
    for call in session.calls:
        found = failures(call)
        say(f"\nFailed in {call.path.name}:" if found else f"\nNothing failed in {call.path.name}.",
            "bold red" if found else "green")  # fmt: skip
        for sentence in found:
            say(f"- {sentence}")
        for line in call.of("note"):
            say(f"  note: {line['step'] or 'run'}: {line.get('text', '')}", "dim")
    console.print()
    for call in session.calls:
        _steps(call, console)
    ceilings = session.latest("ceiling", "name")
    if ceilings:
        say("Ceilings: " + ", ".join(map(_ceiling, ceilings)) + "\n")
    rows = session.rows()
    for op in dict.fromkeys(r["op"] for r in rows):
        _op(str(op), [r for r in rows if r["op"] == op], console)
    _kernels(session.latest("kernel", "case", "mode", "kernel"), console)
    _training(session.of("training"), console)
    _tiles(session, console)


def _head(call: SuiteCall, say) -> None:
    if call.rehearsed:
        say("REHEARSED on a stand-in: no time below was measured", "bold red")
    d, tests = call.device, [x["outcome"] for x in call.of("test")]
    versions = ", ".join(f"{n} {d[n]}" for n in ("torch", "triton", "python") if d.get(n))
    took = max((x["t"] for x in call.lines), default=0)
    say(f"{call.path.name}: call {call.name}, {call.date}, {took:.0f} s on record; {versions}")
    smoke = [x["ok"] is True for x in call.of("smoke")]
    if smoke or tests:
        say(
            f"smoke: {sum(smoke)} of {len(smoke)} right; tests: "
            + (", ".join(f"{tests.count(x)} {x}" for x in dict.fromkeys(tests)) or "none ran")
        )


def _steps(call: SuiteCall, console: Console) -> None:
    table = _table(f"Steps of {call.path.name}", ("step", "end"),
                   ("seconds", "cases begun", "errors", "restarts"))  # fmt: skip
    for name, end in steps(call).items():
        counts = [sum(x["step"] == name for x in call.of(e)) for e in ("start", "error")]
        status = end.get("status", "no end on record")
        cells = (form(end.get("seconds"), "{:.0f}"), *counts, form(end.get("restarts")))
        _add(table, name, status, *cells, style=None if status == "done" else "yellow")
    if table.row_count:
        console.print(table)


def _ceiling(line: Line) -> str:
    factor, unit = UNITS.get(line["unit"], (1.0, line["unit"]))
    value = number(line["value"])
    return f"{line['name']} {form(line['value'] if value is None else value * factor)} {unit}"


def _time(found: dict[str, Row], name: str) -> str:
    row = found.get(name)
    return "" if row is None else form(row["p50_ms"]) if is_timed(row) else str(row["status"])


def fastest_other(rows: list[Row]) -> Row | None:
    """The baseline or peer that does best against ours, in the same rounds."""
    others = [r for r in rows if r["kind"] in ("baseline", "peer") and is_timed(r)]
    known = [r for r in others if number(r["ours_over_this_p50"]) is not None]
    return max(known, key=lambda r: r["ours_over_this_p50"], default=None)


def _sum(times: list[object]) -> str:
    """The times, and their sum."""
    known = [x for x in map(number, times) if x is not None]
    total = f" = {form(sum(known))}" if len(known) == len(times) > 1 else ""
    return " + ".join(map(form, times)) + total


def _op(op: str, rows: list[Row], console: Console) -> None:
    """A line per case and mode."""
    found = groups(rows)
    gemms = any(r["contestant"] in GEMMS for r in rows)
    others = any(fastest_other(x) for x in found.values())
    right = ("ms, graph", "ms, eager", "% of floor", "x GEMMs")
    right += ("ms, logits + dhidden + dweight",) if gemms else ()
    right += ("ours / fastest other",) if others else ()
    table = _table(op, ("case", "mode"), (*right, "goal", ""))
    for (problem, dtype, mode), some in found.items():
        by_name = {str(r["contestant"]): r for r in some}
        ours = by_name.get(GRAPH)
        shown = ours if ours is not None and is_timed(ours) else None
        cells = [_time(by_name, GRAPH), _time(by_name, EAGER)]
        cells += [form(shown and shown[n]) for n in ("percent_of_floor", "to_gemms_p50")]
        if gemms:
            cells.append(_sum([by_name[g]["p50_ms"] for g in GEMMS if g in by_name]))
        if others:
            other = fastest_other(some)
            cells.append(
                f"{form(other['ours_over_this_p50'])} {other['contestant']}" if other else ""
            )
        goal = goal_of(shown) if shown else None
        met = goal.met(shown) if goal else None
        cells += [goal.text if goal else "", {True: "met", False: "not met", None: ""}[met]]
        case = str(problem).replace(f"/{op}_", "/").replace(f"/{op}/", "/")
        case += "" if dtype == "bfloat16" else f" {dtype}"
        _add(table, case, mode, *cells, style="yellow" if met is False else None)
    console.print(table)
    used = {goal_of(r) for r in rows if r["contestant"] == GRAPH} - {None}
    for goal in (g for g in GOALS.values() if g in used):
        console.print(Text(f"{goal.text}: {goal.reason}"), style="dim", highlight=False)
    console.print()


def _kernels(found: list[Line], console: Console) -> None:
    """The kernels that take most of the time, largest first."""
    cases: dict[tuple, list[Line]] = {}
    for line in found:
        cases.setdefault((line["case"], line["mode"]), []).append(line)
    table = _table("Kernels by device time, us", ("case", "mode", f"the first {KERNELS}"), ("all",))
    for (case, mode), some in cases.items():
        known = [(number(x["us"]), x) for x in some]
        timed = sorted(((us, x) for us, x in known if us is not None), key=lambda x: -x[0])
        total = sum(us for us, _ in timed)
        shares = [
            f"{100 * us / total:.0f} % {str(x['kernel'])[:NAME]} {us:.3g}"
            + (f" in {form(x.get('calls'))}" if number(x.get("calls")) not in (None, 1.0) else "")
            for us, x in timed[:KERNELS]
            if total
        ]
        _add(table, case, mode, ", ".join(shares), form(total))
    if table.row_count:
        console.print(table)


def _training(found: list[Line], console: Console) -> None:
    """Whole training steps over those of plain fine-tuning that skips full logits."""
    table = _table("Training steps", ("case", "contestant"),
                   ("ms", "x plain", "memory, x plain", ""))  # fmt: skip
    for line in {(x["case"], str(x["row"].get("contestant"))): x for x in found}.values():
        row = line["row"]
        shown = [form(row.get(n)) for n in ("p50_ms", "to_skipping_p50", "memory_to_skipping")]
        status = str(row.get("status", ""))
        _add(table, line["case"], row.get("contestant", ""), *shown, status)
    if table.row_count:
        console.print(table)


def _tiles(session: Session, console: Console) -> None:
    """What the sweep proposes, bucket by bucket."""
    table = _table("Tiles", ("op", "row of the table", "present -> best"),
                   ("us before", "us", "gain, %", "tried", "out"))  # fmt: skip
    tried = session.latest("tile", "op", "key", "tile")
    for line in session.latest("best", "op", "key"):
        now, was = number(line["us"]), number(line["present_us"])
        gain = form(100 * (1 - now / was), "{:.1f}") if now and was else ""
        same = [x for x in tried if x["op"] == line["op"] and x["key"] == line["key"]]
        out = sum(str(x["status"]).startswith("out") for x in same)
        tiles = [tile_tables.written(x) for x in (line["present_tile"], line["tile"])]
        change = "unchanged: " + tiles[0] if tiles[0] == tiles[1] else " -> ".join(tiles)
        cells = (form(was, "{:.1f}"), form(now, "{:.1f}"), gain, len(same), out)
        _add(table, line["op"], tile_tables.key_of(line["key"]), change, *cells)
    if table.row_count:
        console.print(table)
