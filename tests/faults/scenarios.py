"""The runs that are walked: what the folder holds before, the command, and what must come out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import tree
from tests.faults.client import Ended, Server

TIMES = ("samples_per_second", "tokens_per_second")
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
ABANDONED = "abandoned/"
KEEP_ALL = ("--training.keep", "100")


@dataclass(frozen=True)
class Scenario:
    """One run to walk.

    Args:
        name: as `--scenario` takes it.
        prepare: leaves in the server's folder what the run finds there.
        words: settings of the run.
        again: settings of the run after a fault.
        options: what else the server is asked for.
        saved_before: the step of the checkpoint that is there from the start; 0: none.
        status: how the run ends without a fault.
    """

    name: str
    prepare: Callable[[Server], None]
    words: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    saved_before: int = 0
    status: int = 0


@dataclass(frozen=True)
class Wanted:
    """What a run and the one after a fault must leave.

    Args:
        rows: metrics.jsonl without times.
        old_rows: those of the run whose checkpoints a rollback gives up; right as long as it has
            saved nothing of its own.
        weights: hash of the final model.
        names: every path in the output folder.
        given_up: hashes of the weights of checkpoints that a rollback must not lose.
        base: a copy of the folder before the run.
    """

    rows: list[dict]
    old_rows: list[dict] | None
    weights: str
    names: list[str]
    given_up: tuple[str, ...]
    base: Path


def rows_of(output: Path) -> list[dict]:
    """The whole lines of metrics.jsonl without times."""
    path = output / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights_of(output: Path) -> str:
    """A hash of the final model's weights; empty if there are none."""
    found = [output / "model" / name for name in WEIGHTS if (output / "model" / name).exists()]
    return tree.hash_of(found[0].read_bytes()) if found else ""


def checkpoint_weights(output: Path) -> tuple[str, ...]:
    """Hashes of the weights of every checkpoint, wherever it was moved to."""
    found = [path for name in WEIGHTS for path in output.glob(f"**/checkpoint-*/{name}")]
    return tuple(sorted(tree.hash_of(path.read_bytes()) for path in found))


def steps_of(output: Path) -> list[int]:
    """The steps of the folders that look like checkpoints."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.glob("*"))
    return sorted(int(match[1]) for match in found if match)


def reference(server: Server, scenario: Scenario) -> Wanted:
    """Run a scenario without faults, and what follows it.

    Raises:
        RuntimeError: it fails.
    """
    shutil.rmtree(server.root, ignore_errors=True)
    server.root.mkdir()
    scenario.prepare(server)
    base = server.place / f"base of {scenario.name}"
    tree.replace(base, server.root)
    rollback = scenario.name.startswith("rollback")
    old_rows = rows_of(server.output) if rollback else None
    given_up = checkpoint_weights(server.output) if rollback else ()
    ended = server.run([*scenario.words], **scenario.options)
    if ended.status != scenario.status:
        raise RuntimeError(f"{scenario.name}: ended with {ended.status}:\n{ended.printed}")
    if ended.status:
        _succeed(server.run([*scenario.again]))
    output = server.output
    names = tree.names(output)
    return Wanted(rows_of(output), old_rows, weights_of(output), names, given_up, base)


def _succeed(ended: Ended) -> None:
    if ended.status:
        raise RuntimeError(f"a run that prepares a scenario fails:\n{ended.printed}")


def _nothing(server: Server) -> None:
    pass


def _finished(server: Server) -> None:
    _succeed(server.run([]))


def _three_checkpoints(server: Server) -> None:
    """From step 2 on the bits are others than what the first checkpoint leads to here."""
    _succeed(server.run([*KEEP_ALL], other_from=2))


def _damaged(server: Server) -> None:
    """The newest checkpoint is cut in the middle of a file."""
    _succeed(server.run([*KEEP_ALL]))
    newest = server.output / f"checkpoint-{steps_of(server.output)[-1]}"
    with (newest / "optimizer.pt").open("r+b") as file:
        file.truncate(5000)


def _left_over(server: Server) -> None:
    """What a kill in the middle of the second save leaves."""
    left = server.place / "left over"
    for point in server.walk([]):
        if point.saved == [1] and point.path.endswith("optimizer.pt") and not left.exists():
            for _ in point.meet("kill inside"):
                shutil.copytree(server.root, left, symlinks=True)
    tree.replace(server.root, left)


def scenarios(server: Server) -> dict[str, Scenario]:
    """All of them by name."""
    first = ("--training.resume", str(server.output / "checkpoint-1"))
    lora = ("--model.lora.r", "2", "--objectives.klal.head_weight", "learned")
    best = ("--evaluation.every", "1", "--evaluation.best", "loss")
    found = (
        Scenario("fresh", _nothing),
        Scenario(
            "stopped",
            _nothing,
            words=("--training.save_every", "100"),
            options={"stop_at": 2},
            status=143,
        ),
        Scenario(
            "rollback", _three_checkpoints, words=KEEP_ALL + first, again=KEEP_ALL, saved_before=1
        ),
        Scenario(
            "rollback again",
            _three_checkpoints,
            words=KEEP_ALL + first,
            again=KEEP_ALL + first,
            saved_before=1,
        ),
        Scenario("finished", _finished, saved_before=3),
        Scenario("damaged", _damaged, words=KEEP_ALL, again=KEEP_ALL, saved_before=2),
        Scenario("left over", _left_over, saved_before=1),
        Scenario("adapter", _nothing, words=lora, again=lora),
        Scenario("best", _nothing, words=best, again=best),
    )
    return {scenario.name: scenario for scenario in found}
