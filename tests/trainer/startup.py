"""How long a data set takes to start, the first time and again: `python -m tests.trainer.startup`.

Samples of 1 KB, as many as asked for, with an image each (of some hundred files) or text only. The
second start reads what the first one kept; a third one starts without keeping anything, in one
process, to see what the processes are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from PIL import Image

from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.run_folder import machine

FILES = 500  # images that the samples share


def write(folder: Path, samples: int, *, images: bool) -> Path:
    """A data file of samples of 1 KB."""
    for k in range(FILES if images else 0):
        name = f"{k}.{'jpg' if k % 2 else 'png'}"
        Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(folder / name)
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(samples):
            record = sample(i, images=images)
            short = 1023 - len(json.dumps(record))
            record["messages"][0]["content"] += "?" * max(0, short)
            file.write(json.dumps(record) + "\n")
    return path


def sample(i: int, *, images: bool) -> dict:
    """One sample: two regions, eight words and a phrase if it has an image."""
    answer = f"the total of page {i} stands in the lower right corner, beside the stamp"
    messages = [
        {"role": "user", "content": "What is the total of this page, and where does it stand?"},
        {"role": "assistant", "content": answer},
    ]
    if not images:
        return {"task": "text", "messages": messages}
    k = i % FILES
    return {
        "task": "pages",
        "images": [f"{k}.{'jpg' if k % 2 else 'png'}"],
        "messages": messages,
        "regions": [
            {"text": "the total", "box": [10, 20, 110, 220]},
            {"text": "the stamp", "points": [[31, 52], [35, 58]]},
        ],
        "words": [{"text": f"w{j}", "box": [j * 40, 9, j * 40 + 30, 30]} for j in range(8)],
        "phrases": [{"text": "the stamp", "subject": "stamp"}],
    }


def start(path: Path, **options: object) -> str:
    """Seconds of a start, on the clock and of the processor, this process's and its children's."""
    before, began = os.times(), time.perf_counter()
    dataset = JsonLinesDataset(path, **options)
    seconds, after = time.perf_counter() - began, os.times()
    used = sum(after[:4]) - sum(before[:4])
    return f"{seconds:7.2f} s  (processor {used:.2f} s)  {len(dataset):,} samples"


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument(
        "--kinds", nargs="+", choices=("text", "images"), default=["text", "images"]
    )
    arguments = parser.parse_args()
    print(machine())
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where)
            path = write(folder, arguments.samples, images=kind == "images")
            size = path.stat().st_size / arguments.samples
            print(f"{kind}: {arguments.samples:,} samples, {size:.0f} bytes each")
            print(f"  first start   {start(path, cache=folder / 'run')}")
            print(f"  second start  {start(path, cache=folder / 'run')}")
            print(f"  one process   {start(path, processes=1)}")


if __name__ == "__main__":
    main()
