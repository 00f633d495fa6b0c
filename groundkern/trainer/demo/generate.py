"""Write the demo's data: images and {train,dev,test}.jsonl, the same for the same seed.

`dev` is what settings are chosen on; its samples are those that the demo's tasks and weights were
chosen on. `test` is for the figures that are told, and nothing was chosen by it. No page, chart or
grid is in two of the three.
"""

from __future__ import annotations

import json
import random
from collections.abc import Hashable
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from groundkern.trainer.drawing.scenes import Picture, bar_chart, patch_grid, word_page
from groundkern.trainer.drawing.texts import tables, texts
from groundkern.trainer.records import chat_sample

SIDE = 5  # patches of a pointing grid
LINES = 6  # of a page
BARS = 5  # of a chart
SHARES = {"pointing": 3, "page": 2, "chart": 3}  # of every eight training samples
HELD_OUT = {"pointing": 512, "page": 128, "chart": 128}  # samples of dev, and of test
SEEDS = {"train": "train", "dev": "test", "test": "final test"}  # dev was called test once
_TRIES = 1000  # to draw something new


def corpus(*, seed: int = 0, samples: int = 100) -> list[str]:
    """What the demo's tokenizer is trained on: the texts, the tables' names, some dialogues."""
    found = [" " + " ".join(words) for words in texts()]
    found += [" " + " ".join(name for name, _ in rows) for _, _, rows in tables()]
    for i in range(samples):
        for task in TASKS.values():
            _, sample = task(random.Random(f"{seed} corpus {i}"))
            question, answer = (message["content"] for message in sample["messages"])
            found += [question[1]["text"], answer]
    return found


def pointing(rng: random.Random) -> tuple[Picture, dict]:
    """Where is the red patch of the grid? One region for each of the answer's two coordinates."""
    row, column = rng.randint(1, SIDE), rng.randint(1, SIDE)
    picture = patch_grid(row, column, rng, side=SIDE)
    answer = f"row {row} column {column}"
    box = picture.boxes[0][1]
    spans = [(4, 5), (len(answer) - 1, len(answer))]
    regions = [{"char_span": span, "box": box} for span in spans]
    question = "Where is the red patch?"
    return picture, chat_sample([], question, answer, task="pointing", regions=regions)


def page(rng: random.Random) -> tuple[Picture, dict]:
    """Read the highlighted line of a page that shows a passage of a text."""
    words = rng.choice(texts())
    start = rng.randrange(len(words) - 40)
    line = rng.randrange(LINES)
    picture = word_page(words[start:], rng, columns=8, rows=LINES, marked=line)
    answer, box = picture.boxes[line]
    regions = [{"text": answer, "box": box}]
    question = "Read the highlighted line."
    return picture, chat_sample([], question, answer, task="page", regions=regions)


def chart(rng: random.Random) -> tuple[Picture, dict]:
    """Read the highlighted bar, its name and its value; both are those of a real table."""
    kind, quantity, rows = rng.choice(tables())
    shown = rng.sample(rows, BARS)
    bar = rng.randrange(BARS)
    picture = bar_chart(shown, rng, marked=bar)
    answer = ", ".join(shown[bar])
    regions = [{"text": answer, "box": picture.boxes[bar][1]}]
    question = f"Which {kind} is highlighted, and what is its {quantity}?"
    return picture, chat_sample([], question, answer, task="chart", regions=regions)


TASKS = {"pointing": pointing, "page": page, "chart": chart}


def generate(
    folder: Path,
    *,
    samples: int,
    seed: int = 0,
    held_out: dict[str, int] = HELD_OUT,
    shares: dict[str, int] | None = None,
    shown: bool = True,
) -> None:
    """Write `samples` training samples and the held-out samples of each task under `folder`.

    Args:
        folder: gets images/ and {train,dev,test}.jsonl; made if missing.
        samples: how many training samples, all tasks together, in a shuffled order.
        seed: the same seed gives the same files.
        held_out: how many samples of each task dev has, and test as many.
        shares: how many training samples of each task follow one another before they are shuffled;
            None: `SHARES`.
        shown: false for no progress bars.

    Raises:
        ValueError: more held-out samples than there are different ones.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    shares = SHARES if shares is None else shares
    turns = [task for task, share in shares.items() for _ in range(share)]
    train = [turns[i % len(turns)] for i in range(samples)]
    random.Random(seed).shuffle(train)
    held = [task for task, count in held_out.items() for _ in range(count)]
    taken: set[Hashable] = set()  # what is on the pictures drawn before
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as progress:
        for split, tasks in (("dev", held), ("test", held), ("train", train)):
            bar, avoid = progress.add_task(f"render {split}", total=len(tasks)), set(taken)
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for i, task in enumerate(tasks):
                    picture, sample = _new(task, f"{seed} {SEEDS[split]} {i}", avoid)
                    taken.add(drawn_on(picture))
                    if split == "test":  # no two of these are of one picture
                        avoid.add(drawn_on(picture))
                    name = f"images/{split}-{i:05d}.png"
                    picture.image.save(folder / name)
                    sample["images"] = [name]
                    sample["words"] = [{"text": text, "box": box} for text, box in picture.words]
                    file.write(json.dumps(sample) + "\n")
                    progress.advance(bar)


def drawn_on(picture: Picture) -> Hashable:
    """What is on a picture, whatever its colours and its mark: its words, or else its pixels."""
    return tuple(text for text, _ in picture.words) or picture.image.tobytes()


def _new(task: str, seed: str, avoid: set[Hashable]) -> tuple[Picture, dict]:
    for number in range(_TRIES):
        again = f" again {number}" if number else ""
        picture, sample = TASKS[task](random.Random(seed + again))
        if drawn_on(picture) not in avoid:
            return picture, sample
    raise ValueError(f"`held_out`: expected fewer samples of {task}: there are no more to draw")
