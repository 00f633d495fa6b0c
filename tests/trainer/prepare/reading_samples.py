"""What tests of annotation readers share: a command run, its samples and its rejects."""

import json
from pathlib import Path

from PIL import Image

from groundkern.trainer.program import main


def prepared(output: Path, *words) -> tuple[int, list[dict], list[dict]]:
    """(exit status, samples, rejected) of `groundkern prepare WORDS --output OUTPUT`."""
    command, *rest = map(str, words)
    status = main(["prepare", command, "--workers", "1", *rest, "--output", str(output)])
    rejects = output.with_name(output.name + ".rejected.jsonl")
    return status, lines(output), lines(rejects)


def lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def picture(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (200, 220, 240)).save(path)
    return path


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def said(sample: dict) -> tuple[str, str]:
    """(question, answer) of a sample with one of each."""
    question, answer = (message["content"] for message in sample["messages"])
    return question[-1]["text"], answer
