"""What went wrong in a call of `make gpu`: one sentence for everything that failed in the same
way."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.lines import Line
from benchmarks.gpu.reporting.sessions import SuiteCall, outcome

WIDEST = 200  # characters of a message that are shown
NAMED = 12  # failures of each kind that are named; the rest is counted


def last_line(text: object) -> str:
    """The exception at the end of a traceback."""
    found = [x.strip() for x in str(text or "").splitlines() if x.strip()]
    return found[-1] if found else ""


def steps(call: SuiteCall) -> dict[str, Line]:
    """Each step that began or ended, in order, with its end line; an empty one if it did not
    end."""
    found: dict[str, Line] = {}
    for line in call.lines:
        if line["event"] == "begin":
            found.setdefault(line["step"], {})
        elif line["event"] == "end" and line["step"]:
            found[line["step"]] = line
    return found


def failures(call: SuiteCall) -> list[str]:
    """Wrong kernels first, then exceptions, tests, steps, and cases that did not end."""
    sorts = (_smoke(call), _errors(call), _rows(call), _tests(call), _steps(call), _cut(call))
    return [sentence for sort in sorts for sentence in _short(list(sort))]


def _short(sentences: list[str]) -> list[str]:
    rest = len(sentences) - NAMED
    return sentences if rest <= 0 else [*sentences[:NAMED], f"and {rest} more of this sort"]


def _smoke(call: SuiteCall) -> Iterator[str]:
    for line in call.of("smoke"):
        if line["ok"] is True:
            continue
        bad = [c for c in line["checks"] if c.get("ok") is not True]
        wrong = [f"{c.get('name')} off by {_g(c.get('error'))}, allowed {_g(c.get('allowed'))}"
                 for c in bad]  # fmt: skip
        yield f"smoke: {line['case']}: {'; '.join(wrong) or 'not right'}"


def _g(x: object) -> str:
    return f"{x:.3g}" if isinstance(x, float) else str(x)


def _alike(found: list[tuple[str, str]]) -> Iterator[str]:
    """(case, exception) pairs as sentences, one for all cases with the same exception."""
    cases: dict[str, list[str]] = {}
    for case, raised in found:
        cases.setdefault(raised, []).append(case)
    for raised, some in cases.items():
        more = f" and {len(some) - 1} more" if len(some) > 1 else ""
        yield f"{some[0]}{more}: {raised}"


def _errors(call: SuiteCall) -> Iterator[str]:
    found = []
    for line in call.of("error"):
        kind, message = str(line["kind"]), str(line["message"])[:WIDEST]
        raised = last_line(line.get("traceback"))[:WIDEST]
        if kind not in raised:  # a message of several lines ends with the cause, or where to look
            raised = f"{kind}: {message}" + (f" ... {raised}" if raised not in message else "")
        where = ": ".join(x for x in (line["step"], line.get("case")) if x)
        found.append((where, raised))
    yield from _alike(found)


def _rows(call: SuiteCall) -> Iterator[str]:
    rows = [x["row"] for x in call.of("row")]
    bad = [r for r in rows if outcome(r) in ("failed", "disagrees")]
    yield from _alike([(f"{r['problem']}, {r['contestant']}", str(r["status"])) for r in bad])


def _tests(call: SuiteCall) -> Iterator[str]:
    bad = [x for x in call.of("test") if x["outcome"] in ("failed", "error")]
    yield from _alike([(x["test"], last_line(x.get("text")) or x["outcome"]) for x in bad])


def _steps(call: SuiteCall) -> Iterator[str]:
    for name, end in steps(call).items():
        if not end:
            yield f"step {name} began and has no end: the record stops there"
        elif end["status"] != "done":
            yield f"step {name}: {end['status']}"


def _cut(call: SuiteCall) -> Iterator[str]:
    """Cases that began and neither ended nor raised: the process or the machine died."""
    begun = {(x["step"], x.get("case")) for x in call.of("start")}
    known = {(x["step"], x.get("case")) for e in ("done", "error") for x in call.of(e)}
    left = begun - known if call.of("done") else set()
    for step, case in sorted(left, key=str):
        yield f"{step}: {case}: began and did not end"
