"""What must hold after a fault, and after the same command was given again."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tests.faults import tree
from tests.faults.client import KILLED, Ended
from tests.faults.plan import KILLS
from tests.faults.scenarios import (
    ABANDONED,
    Scenario,
    Wanted,
    checkpoint_weights,
    rows_of,
    steps_of,
    weights_of,
)

_CONTINUING = re.compile(r"Continuing from \S*checkpoint-(\d+), step (\d+)")
_SAVED = re.compile(r"Stopped by SIGTERM: saved in \S*checkpoint-(\d+)")
_SENTENCES = ("error: ", "Stopped by ")
# Where an error loses nothing that another call does not promise: a file's bytes are safe when it
# is flushed and renamed; what the lock file says about its holder only helps; the index is a cache.
_MAY_IGNORE = ("open", "close", "mkdir", "unlink", "rmdir", "link", "symlink")
_ONLY_HELP = ("run/run.lock", "run/index")


@dataclass(frozen=True)
class Recovery:
    """What the run after a fault did.

    Args:
        problems: what is wrong in any case.
        step: of the checkpoint it took; 0: it started anew.
        follows: "new" or "old" rows, or "neither".
    """

    problems: tuple[str, ...]
    step: int
    follows: str
    printed: str


def lines(printed: str) -> list[str]:
    """The lines that were printed, without blank ones."""
    return [line.strip() for line in re.split(r"[\r\n]", printed) if line.strip()]


def ending(kind: str, op: str, path: str, ended: Ended, output: Path, wanted: Wanted) -> list[str]:
    """How a run that met a fault must end: killed, with a sentence, or with all there is to give.

    Args:
        kind: the fault.
        op, path: the call it came to.
        ended: the run.
        output: its folder.
        wanted: the result of a run without a fault.
    """
    if kind in KILLS:
        return [] if ended.status == KILLED else [f"survived being killed: {ended.status}"]
    if ended.status < 0:
        return [f"ended by signal {-ended.status}{' (it hung)' if ended.status == -14 else ''}"]
    if "Traceback" in ended.printed:
        raised = [line for line in lines(ended.printed) if re.match(r"[\w.]+Error", line)]
        return [f"traceback: {raised[-1:]}"]
    if ended.status:
        if sum(line.startswith(_SENTENCES) for line in lines(ended.printed)) == 1:
            return []
        return [f"status {ended.status} without a sentence: {ended.printed[-300:]}"]
    found = [f"status 0, but {problem}" for problem in incomplete(output, wanted)]
    loses = kind != "short" and op not in _MAY_IGNORE and not path.startswith(_ONLY_HELP)
    if loses and "rror" not in ended.printed:
        found.append(f"{kind} at {op} and not a word about it")
    return found


def incomplete(output: Path, wanted: Wanted) -> list[str]:
    """What a finished run's folder lacks."""
    found = []
    if rows_of(output) != wanted.rows:
        found.append(f"metrics.jsonl differs: {_summary(output)}")
    if weights_of(output) != wanted.weights:
        found.append("the final weights differ")
    missing = set(expected(wanted)) - set(tree.names(output))
    return found + ([f"missing: {sorted(missing)[:3]}"] if missing else [])


def expected(wanted: Wanted) -> list[str]:
    """The paths that every finished run has.

    The index is a cache; what a rollback gives up is looked for by its content.
    """
    return [name for name in wanted.names if not name.startswith((ABANDONED, "index/"))]


def _told_of(name: str, wanted: Wanted) -> bool:
    """Whether it is in a folder that the run without a fault leaves too, for the user to remove."""
    return name.startswith(ABANDONED) and ABANDONED in wanted.names


def artifacts(output: Path, wanted: Wanted, steps: int) -> list[str]:
    """What is wrong with the files that are whole or absent, and with the rows that must be there.

    Args:
        output: the folder.
        wanted: the result of a run without a fault.
        steps: the step of the newest checkpoint that was complete.
    """
    found = []
    for path in (output / "groundkern.json", *output.glob("evaluation-*.json")):
        if path.exists() and not _is_json(path):
            found.append(f"{path.name} is there in part")
    page = output / "report.html"
    if page.exists() and not tree.holds_whole(page):
        found.append("report.html is there in part")
    try:
        rows = rows_of(output)
    except ValueError:
        rows = []
    for allowed in (wanted.rows, wanted.old_rows):
        if allowed is not None and rows[:steps] == allowed[:steps]:
            return found
    return [*found, f"metrics.jsonl lost rows up to step {steps}: {_summary(output)}"]


def passed_over(printed: str, before: list[str], step: int) -> list[str]:
    """The checkpoints that a run left for an older one without saying so.

    Args:
        printed: by the run.
        before: the paths that it found.
        step: of the one that it took.
    """
    newer = [int(n) for n in re.findall(r"^checkpoint-(\d+)/$", "\n".join(before), re.M)]
    return [
        f"checkpoint-{n} passed over without a word"
        for n in newer
        if n > step and f"checkpoint-{n}" not in printed and "abandoned" not in printed
    ]


def recovery(ended: Ended, before: list[str], output: Path, wanted: Wanted) -> Recovery:
    """Judge the run after a fault.

    Args:
        ended: the run.
        before: the paths that it found.
        output: its folder.
        wanted: the result of a run without a fault.
    """
    taken = _CONTINUING.search(ended.printed)
    step = int(taken[2]) if taken else 0
    if ended.status or "Traceback" in ended.printed:
        said = [line for line in lines(ended.printed) if line.startswith(_SENTENCES)]
        problem = f"cannot go on, status {ended.status}: {said or lines(ended.printed)[-1:]}"
        return Recovery((problem,), step, "neither", ended.printed)
    found = passed_over(ended.printed, before, step)
    rows = rows_of(output)
    follows = "new" if rows == wanted.rows else "old" if rows == wanted.old_rows else "neither"
    if follows == "neither":
        found.append(f"the losses differ from an uninterrupted run: {_summary(output)}")
    found += artifacts(output, wanted, 0)
    names = tree.names(output)
    if follows == "new" and weights_of(output) != wanted.weights:
        found.append("the final weights differ")
    found += [f"missing: {name}" for name in expected(wanted) if name not in names][:3]
    lost = set(wanted.given_up) - set(checkpoint_weights(output))
    found += [f"a checkpoint that the rollback gave up is gone: {sorted(lost)}"] if lost else []
    extra = [name for name in names if name not in wanted.names and not _told_of(name, wanted)]
    tops = sorted({name.split("/")[0] for name in extra})
    found += [f"left behind: {extra[0]}" for top in tops if not _named(top, extra, ended.printed)]
    return Recovery(tuple(found), step, follows, ended.printed)


def enough(found: Recovery, scenario: Scenario, saved: list[int], printed: str) -> list[str]:
    """Whether a recovery went on from the newest checkpoint that was ever complete.

    Args:
        found: the recovery.
        scenario: what was walked.
        saved: steps that the faulty run had saved before the fault.
        printed: what the faulty run said.
    """
    told = _SAVED.search(printed)
    steps = [*saved, *([int(told[1])] if told else [])]
    if "--training.resume" in scenario.again:  # it is told where to continue
        steps = []
    needed = max(steps, default=scenario.saved_before)
    if steps and found.follows == "old":
        return ["went back to the checkpoints that the rollback gave up"]
    if found.step < needed:
        return [f"checkpoint-{needed} was complete, and step {found.step} was taken"]
    return []


def _named(top: str, extra: list[str], printed: str) -> bool:
    files = [name for name in extra if name.split("/")[0] == top]
    return top in printed or all(name.rstrip("/").split("/")[-1] in printed for name in files)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _summary(output: Path) -> str:
    path = output / "metrics.jsonl"
    if not path.exists():
        return "no file"
    try:
        steps = [row["step"] for row in rows_of(output)]
    except (ValueError, KeyError) as error:
        return f"{path.stat().st_size} bytes, {error}"
    return f"steps {steps}, checkpoints {steps_of(output)}"
