"""Checkpoints that are whole or not there: saved aside, sealed with hashes, renamed, verified.

A checkpoint is written under `saving/`, which is always disposable. Its record comes last and holds
the size and sha256 of every other file; then everything is flushed and renamed to `checkpoint-N` in
one step. Nothing older is removed before that. A checkpoint that does not agree with its record is
never taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

from groundkern.hf.watching.plain import finite_or_none
from groundkern.trainer import durable
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.data.order import Course
from groundkern.trainer.differences import differences
from groundkern.trainer.progress import progress
from groundkern.trainer.ranks import Ranks, of_a_collective
from groundkern.trainer.run_folder import METRICS, RECORD

logger = logging.getLogger(__name__)

SAVING, ABANDONED = "saving", "abandoned"
# What may change when an interrupted run is continued: none of it changes the losses.
FREE_TO_CHANGE = (
    "data.max_bad_fraction",
    "training.output",
    "training.resume",
    "training.save_every",
    "training.keep",
    "training.workers",
    "training.report_to",
    "training.term_norms_every",
    "training.max_nonfinite",
    "training.arguments.dataloader_",
    "training.arguments.ddp_b",  # bucket_cap_mb, broadcast_buffers
    "training.arguments.ddp_timeout",
    "training.arguments.include_num_input_tokens_seen",
    "training.arguments.log",  # level, on_each_node, logging_first_step
    "training.arguments.project",
    "training.arguments.run_name",
    "training.arguments.torch_empty_cache_steps",
    "training.arguments.trackio_",
    "training.strategy",
    "training.context_",
    "training.processes",
    "evaluation.",
)
# How a step's samples are divided: free while the step, on all processes, takes as many.
_DIVISION = ("training.batch_size", "training.accumulation")
# What a record has that knows today's labels of words; older ones were the word's first token.
_LABELS = tuple(
    f"supervision.{name}" for name in ("number_label", "strip_punctuation", "max_number_tokens")
)
_OF_THE_DISK = (OSError, RuntimeError, SafetensorError)
_SHOWN_FROM = 2**30  # bytes of a checkpoint from which checking it has a bar


@contextmanager
def aside(output: Path, name: str, ranks: Ranks | None = None) -> Iterator[Path]:
    """A new folder that is flushed and becomes `output/name` if the block ends without an error.

    Args:
        output: of the run.
        name: of the folder.
        ranks: the processes that write into it, each of which calls this; the first one makes and
            renames it. None: this one.

    Raises:
        RankError: another process could not write its part.
        StorageError: it could not be written; what was at `output/name` is as it was.
    """
    ranks, partial = ranks or Ranks(), output / SAVING / name
    try:
        ranks.alone(lambda: _new(partial), f"the folder of {name}")
        yield partial
        written_by_all(partial, ranks)
        ranks.alone(lambda: _kept(partial, output / name), f"the new name of {name}")
    except Exception as error:
        # torch.save raises a RuntimeError, and tokenizers nothing but an Exception
        if not isinstance(error, _OF_THE_DISK) and type(error) is not Exception:
            raise
        if of_a_collective(error):
            raise
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise durable.cannot_write(output / name, error) from error


def _new(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _kept(folder: Path, target: Path) -> None:
    durable.sync_tree(folder)
    durable.replace_folder(folder, target)


def written_by_all(folder: Path, ranks: Ranks) -> None:
    """Returns when every process has written its files into a folder, and flushed them.

    Args:
        folder: of `aside`.
        ranks: the processes.

    Raises:
        RankError: another process could not.
    """
    if ranks.size == 1:  # `aside` flushes
        return
    ranks.wait(f"the last file of {folder.name}")  # none is written while folders are walked
    durable.sync_tree(folder)
    ranks.wait(f"the last flush of {folder.name}")


def seal(
    checkpoint: Path,
    config: Config,
    *,
    train_digest: str,
    counts: Counter,
    position: dict[str, int] | None = None,
) -> None:
    """Write the record of a checkpoint, the last of its files.

    Args:
        checkpoint: the folder, with everything else in it.
        config: the run's settings.
        train_digest: sha256 of the training files (of a stream, of their sizes and ends).
        counts: supervision found and lost so far.
        position: the samples of the data, those taken so far, and the processes that took them
            (`read_position`), those that share samples counted once.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_threads()) as pool:
        hashes = list(pool.map(durable.digest, files))
    record = {
        "config": config.model_dump(mode="json"),
        "train_sha256": train_digest,
        "supervision": dict(counts),
        "position": position,
        "files": {
            path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": found}
            for path, found in zip(files, hashes, strict=True)
        },
    }
    record = finite_or_none(record)
    durable.write_json(checkpoint / RECORD, {**record, "sha256": _own_digest(record)})


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, in words; None if every file is as it was saved."""
    try:
        record = durable.read_json(checkpoint / RECORD)
        if not isinstance(record, dict) or "files" not in record:
            return f"{RECORD} has no hashes of its files"
        if record.pop("sha256", None) != _own_digest(record):
            return f"{RECORD} was changed"
    except FileNotFoundError:
        return f"it has no {RECORD}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{RECORD} cannot be read ({type(error).__name__})"
    files = record["files"]
    for name, saved in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != saved["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes of {saved['bytes']:,}"
    return _changed(checkpoint, {name: saved["sha256"] for name, saved in files.items()})


def _changed(checkpoint: Path, hashes: dict[str, str]) -> str | None:
    """Which file no longer has its hash, in words."""
    total = sum((checkpoint / name).stat().st_size for name in hashes)
    with (
        progress(
            f"check {checkpoint.name}", total=total, unit="B", shown=total >= _SHOWN_FROM
        ) as bar,
        ThreadPoolExecutor(_threads()) as pool,
    ):
        try:
            found = pool.map(lambda name: durable.digest(checkpoint / name, bar.update), hashes)
            for name, now in zip(hashes, found, strict=True):
                if now != hashes[name]:
                    return f"{name} was changed"
        except OSError as error:
            return f"{error.filename} cannot be read ({error.strerror})"
    return None


def listed(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("*"))
    found = [(int(number[1]), path) for number, path in named if number and path.is_dir()]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has taken."""
    return durable.read_json(checkpoint / "trainer_state.json")["global_step"]


def read_counts(checkpoint: Path) -> Counter:
    """Supervision found and lost until a checkpoint."""
    return Counter(durable.read_json(checkpoint / RECORD)["supervision"])


def read_position(checkpoint: Path, train_digest: str, course: Course) -> Course:
    """The course of a run that continues from a checkpoint: it goes on at its next sample.

    Args:
        checkpoint: its folder.
        train_digest: sha256 of the run's training file.
        course: of a run that starts anew.

    Returns:
        A course that stands where the checkpoint stands; on other data at its step.
    """
    record, step = durable.read_json(checkpoint / RECORD), step_of(checkpoint)
    position = record.get("position")
    if position is None:  # of one process
        saved = record["config"]["training"]
        old = Course(course.samples, saved["batch_size"], saved["accumulation"])
        position = {"samples": course.samples, "taken": old.at(step)}
    same = record["train_sha256"] == train_digest and position["samples"] == course.samples
    return replace(course, step=step, taken=position["taken"] if same else course.at(step))


def find(config: Config, processes: int = 1) -> Path | None:
    """The checkpoint that `training.resume` asks for, None for a fresh start.

    Args:
        config: the run's settings.
        processes: how many of the run take different samples.

    Raises:
        ConfigError: no such checkpoint, no whole one, one in the way of `never`, or one of other
            settings.
    """
    output, resume = config.training.output, config.training.resume
    found = listed(output)
    if resume == "never":
        if found:
            raise ConfigError(
                f"`training.resume`: never, but {output} holds checkpoints of an earlier run; "
                "choose another training.output or remove them"
            )
        return None
    if resume == "auto":
        taken = _newest_whole(found, output)
        if taken is not None:
            _refuse_other_settings(taken, config, processes)
        return taken
    named = Path(resume)
    if not named.is_dir():
        raise ConfigError(f"`training.resume`: expected auto, never or a checkpoint, got {resume}")
    if reason := fault(named):
        raise ConfigError(f"`training.resume`: expected a whole checkpoint, got {named}: {reason}")
    if _has_old_labels(durable.read_json(named / RECORD)["config"]):
        _warn_of_labels(named)
    return named


def _newest_whole(found: list[Path], output: Path) -> Path | None:
    for checkpoint in reversed(found):
        reason = fault(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is damaged and is passed over: %s", checkpoint, reason)
    if found:
        raise ConfigError(
            f"`training.resume`: auto, but no checkpoint in {output} is whole; choose another "
            "training.output to start anew"
        )
    return None


def _refuse_other_settings(checkpoint: Path, config: Config, processes: int) -> None:
    whole = durable.read_json(checkpoint / RECORD)
    record = whole["config"]
    try:  # fields added since have their defaults
        saved = Config.model_validate(record)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise _of_other(checkpoint, f"`{where}` of another version of groundkern") from None
    old, new = (each.model_dump(mode="json") for each in (saved, config))
    relabelled = _has_old_labels(record)
    free = FREE_TO_CHANGE + (_LABELS if relabelled else ())
    before, now = _in_step(saved, _processes(whole)), _in_step(config, processes)
    divided = [] if before == now else [f"samples in a step: {before} -> {now}"]
    # the batches of a stream say which of its samples have about the same length
    if not divided and not (config.data.streaming and config.data.group_by_length):
        free += _DIVISION
    changed = differences(old, new, ignore=free)
    if any(each.startswith(_DIVISION) for each in changed):
        changed += divided  # more processes alone are no other settings
    if relabelled and (saved.objectives.dv_sft or saved.objectives.logit_lens):
        changed.append("labels of words by another version of groundkern")
    if changed:
        raise _of_other(checkpoint, "; ".join(changed))
    if relabelled:
        _warn_of_labels(checkpoint)


def _processes(record: dict) -> int:
    """The processes of the run that wrote a checkpoint's record; the oldest know of one only."""
    return (record.get("position") or {}).get("processes", 1)


def _in_step(config: Config, processes: int) -> int:
    """The samples that a step takes, on all processes together."""
    return config.training.batch_size * config.training.accumulation * processes


def _has_old_labels(config: dict) -> bool:
    """Whether saved settings are from before numbers had several labels: no setting of today gives
    quite the same labels."""
    return "number_label" not in config["supervision"]


def _warn_of_labels(checkpoint: Path) -> None:
    logger.warning(
        "%s is of another version of groundkern: labels of words are made otherwise from here on, "
        "and word figures before and after do not compare",
        checkpoint,
    )


def refuse_other_data(checkpoint: Path, config: Config, train_digest: str) -> None:
    """Refuse to continue by itself on another training file; a named checkpoint may.

    Raises:
        ConfigError: the training file's content is not the checkpoint's.
    """
    if config.training.resume == "auto" and not same_data(checkpoint, train_digest):
        files = ", ".join(str(file.path) for file in config.data.train_files)
        raise _of_other(checkpoint, f"the contents of {files}")


def same_data(checkpoint: Path, train_digest: str) -> bool:
    """Whether a checkpoint was trained on what has this hash."""
    return durable.read_json(checkpoint / RECORD)["train_sha256"] == train_digest


def _of_other(checkpoint: Path, changed: str) -> ConfigError:
    return ConfigError(
        f"{checkpoint} was trained with other settings ({changed}); choose another "
        f"training.output, or continue from it with --training.resume {checkpoint}"
    )


def roll_back(output: Path, start: Path | None) -> Path | None:
    """Move away what a run that starts from `start` leaves behind: it is of another line.

    That is every checkpoint that is not `start` or older in the same folder, and the metrics with
    them. They are never removed.

    Args:
        output: the run's folder.
        start: the checkpoint it continues from; None: from the beginning.

    Returns:
        The folder they were moved to; None if there was nothing to move.

    Raises:
        StorageError: they could not be moved.
    """
    found, own = listed(output), start is not None and start.resolve().parent == output.resolve()
    kept = [path for path in found if own and _number(path) <= _number(start)]
    left = [path for path in found if path not in kept]
    if not left and (own or start is None or not (output / METRICS).exists()):
        return None
    before = [int(path.name) for path in (output / ABANDONED).glob("*") if path.name.isdigit()]
    target = output / ABANDONED / str(max(before, default=0) + 1)
    try:
        target.mkdir(parents=True)
        durable.sync_folder(output)
        durable.sync_folder(target.parent)
        if (output / METRICS).exists():
            durable.write_bytes(target / METRICS, (output / METRICS).read_bytes())
        for path in reversed(left):  # the newest first: what is left is always a line of one run
            durable.move(path, target / path.name)
        if not own:
            durable.write_text(output / METRICS, "")
    except OSError as error:
        raise durable.cannot_write(target, error) from error
    return target


def rotate(output: Path, keep: int, *, best: int | None = None) -> None:
    """Remove the oldest checkpoints, when a newer one is whole.

    Args:
        output: the run's folder; its newest checkpoint was just saved or found whole.
        keep: how many of the newest stay.
        best: the step of one that stays besides.

    Raises:
        StorageError: one could not be removed.
    """
    old = [path for path in listed(output)[:-keep] if _number(path) != best]
    saving = output / SAVING
    for path in old:
        gone = saving / f"removed-{path.name}"  # so that half of it is never taken for a checkpoint
        try:
            saving.mkdir(exist_ok=True)
            durable.move(path, gone)
            shutil.rmtree(gone)
        except OSError as error:
            raise durable.cannot_write(path, error) from error


def clean(output: Path) -> None:
    """Remove what an earlier process left half written. Only the holder of the lock may."""
    with suppress(FileNotFoundError):
        shutil.rmtree(output / SAVING)
    for partial in output.glob(f"*{durable.PARTIAL}"):
        partial.unlink()


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _own_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
