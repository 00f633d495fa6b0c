"""The output folder of a run: metrics.jsonl, checkpoints with their counts, groundkern.json."""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.config import Config, ConfigError, differences

METRICS, RECORD, REPORT, MODEL = "metrics.jsonl", "groundkern.json", "report.html", "model"
BEFORE, AFTER = "evaluation-before.json", "evaluation-after.json"
_NOT_LOSSES = ("step", "steps", "epoch", "grad_norm", "learning_rate", "samples_per_second")
# What may change when an interrupted run is continued: none of it changes the losses.
FREE_TO_CHANGE = (
    "training.resume",
    "training.save_every",
    "training.keep",
    "training.workers",
    "evaluation.",
)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(output: Path) -> list[dict]:
    """The rows of metrics.jsonl, without a last one that was cut off; none if there is no file."""
    path = output / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def loss_terms(rows: list[dict]) -> list[str]:
    """The logged losses: the total, the text loss, then the others in the order they appear."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_LOSSES)
    return sorted(names, key=lambda name: ("loss", "text", name).index(name))


def keep_metrics(output: Path, step: int) -> None:
    """Drops the rows of metrics.jsonl after `step`: training continues (or starts) from there."""
    rows = [json.dumps(row) + "\n" for row in read_metrics(output) if row["step"] <= step]
    (output / METRICS).write_text("".join(rows), encoding="utf-8")


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first (its record is written last)."""
    found = {}
    for path in output.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / RECORD).exists():
            found[int(number[1])] = path
    return [found[step] for step in sorted(found)]


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `training.resume` asks for, None for a fresh start.

    Raises:
        ConfigError: no such checkpoint, one in the way of `never`, or one of other settings.
    """
    output, resume = config.training.output, config.training.resume
    found = checkpoints(output)
    if resume == "never":
        if found:
            raise ConfigError(
                f"`training.resume`: never, but {output} holds checkpoints of an earlier run; "
                "choose another training.output or remove them"
            )
        return None
    if resume != "auto":
        if not (Path(resume) / RECORD).exists():
            raise ConfigError(
                f"`training.resume`: expected auto, never or a checkpoint, got {resume}"
            )
        return Path(resume)
    if not found:
        return None
    record = read_json(found[-1] / RECORD)
    saved = Config.model_validate(record["config"])  # with the defaults of fields added since
    old, new = (each.model_dump(mode="json") for each in (saved, config))
    changed = differences(old, new, ignore=FREE_TO_CHANGE)
    if record["train_bytes"] != _size(config.data.train):
        changed.append(f"the contents of {config.data.train}")
    if changed:
        raise ConfigError(
            f"{found[-1]} was trained with other settings ({'; '.join(changed)}); choose another "
            f"training.output, or continue from it with --training.resume {found[-1]}"
        )
    return found[-1]


def write_checkpoint_record(checkpoint: Path, config: Config, counts: Counter) -> None:
    """Writes the settings and counts of a checkpoint beside it, which marks it complete."""
    write_json(
        checkpoint / RECORD,
        {
            "config": config.model_dump(mode="json"),
            "train_bytes": _size(config.data.train),
            "supervision": counts,
        },
    )


def read_counts(checkpoint: Path) -> Counter:
    """Supervision found and lost until a checkpoint."""
    return Counter(read_json(checkpoint / RECORD)["supervision"])


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def versions() -> dict[str, str]:
    """Version of each package that shapes a result."""
    found = {"python": platform.python_version()}
    for name in ("groundkern", "torch", "transformers", "accelerate", "peft", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> str:
    """The machine in words: processor, cores, accelerator."""
    import torch

    cores = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if not torch.cuda.is_available():
        return cores
    return f"{cores}, {torch.cuda.get_device_name()}"
