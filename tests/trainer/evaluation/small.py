"""Held-out samples of every kind for a tiny model, and the command on them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern.trainer.program import main

TOKENS = 6  # of an answer


def user(*parts: str | None) -> dict:
    """A user's message; None is an image."""
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": content}


def said(text: str) -> dict:
    """An assistant's message."""
    return {"role": "assistant", "content": text}


def samples() -> list[dict]:
    """One image and a region; two images; none; several turns; a last turn without an answer."""
    ask, box = "Where is the red patch?", {"text": "row 0 column 1", "box": [28, 0, 56, 28]}
    point = [
        {
            "task": "pointing",
            "images": [f"{i}.png"],
            "messages": [user(None, f"{ask} {'Tell me. ' * (i % 3)}"), said("row 0 column 1")],
            "regions": [box],
        }
        for i in range(4)
    ]
    two = [user("Before:", None, "After:", None, "What changed?"), said("The coal is gone.")]
    turns = [
        {"role": "system", "content": "You are a helpful assistant."},
        user(None, "How much coal was mined?"),
        said("65 million tons"),
        user("In which year?"),
        said("1854"),
    ]
    text = [user("Is a single man in want of a wife?"), said("It is a truth.")]
    asked = [user(None, "Read the word."), said("coal"), user("And the other?", None)]
    return [
        *point,
        {"task": "reading", "images": ["0.png", "1.png"], "messages": two},
        {"task": "reading", "images": ["2.png"], "messages": turns},
        {"task": "reading", "messages": text},
        {"task": "reading", "images": ["3.png", "0.png"], "messages": asked},
    ]


def make(where: Path) -> Path:
    """`test.jsonl`, its images and a model with its processor, in a folder."""
    for i in range(4):
        image = Image.new("RGB", (84, 56 + 28 * (i % 2)), "white")
        ImageDraw.Draw(image).rectangle([28, 0, 56, 28], fill=("red", "blue")[i % 2])
        image.save(where / f"{i}.png")
    write(where / "test.jsonl", samples())
    tiny_qwen_model().save_pretrained(where / "model")
    tiny_qwen_processor().save_pretrained(where / "model")
    return where


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(
    where: Path, output: Path, *more: str, full: bool = False, flags: tuple[str, ...] = ()
) -> list[str]:
    """The command line of an evaluation of the tiny model, in fp32 on the CPU.

    Args:
        where: of `make`.
        output: of the evaluation.
        more: options with values, which replace what stands here.
        full: with the figures of where it looks, and with pictures.
        flags: options without values.
    """
    given = {"--model": where / "model", "--data": where / "test.jsonl", "--output": output}
    given |= {"--max-new-tokens": TOKENS, "--batch-size": 3, "--device": "cpu"}
    given |= {} if full else {"--failures": 0}
    given |= dict(zip(more[::2], more[1::2], strict=True))
    last = flags if full else (*flags, "--no-grounding")
    return ["evaluate", *(str(word) for pair in given.items() for word in pair), *last]


def run(
    where: Path, output: Path, *more: str, full: bool = False, flags: tuple[str, ...] = ()
) -> int:
    """The exit status of the command."""
    return main(words(where, output, *more, full=full, flags=flags))


def predictions(output: Path) -> list[dict]:
    """The rows of a finished evaluation."""
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


def result(output: Path) -> dict:
    """evaluation.json."""
    return json.loads((output / "evaluation.json").read_text())
