"""Drawn clips: answers read back from the pixels, patches that move, records that load."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from string import ascii_uppercase

import numpy as np
import pytest

from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.drawing.scenes import RED
from groundkern.trainer.prepare.maps.drawn.clips import OTHERS
from groundkern.trainer.prepare.maps.tasks import CLIPS, SPLITS, stream
from tests.trainer.prepare.reading_samples import prepared

SIDE, CELL = 3, 14
SETTINGS = {"size": SIDE * CELL, "difficulty": "easy", "side": SIDE}


def cells(frames, colour) -> list[int | None]:
    """The cell of a patch in each frame, by its pixels; None: it is not there."""
    found = []
    for frame in frames:
        pixels = np.asarray(frame, dtype=int)
        assert pixels.shape == (SIDE * CELL, SIDE * CELL, 3)
        middles = pixels[CELL // 2 :: CELL, CELL // 2 :: CELL].reshape(-1, 3)
        near = (np.abs(middles - colour).max(-1) <= 15) & (np.ptp(middles, axis=-1) > 60)
        assert near.sum() <= 1
        found.append(int(near.argmax()) if near.any() else None)
    return found


@pytest.mark.parametrize("task", CLIPS)
def test_answer_and_region_are_what_the_pixels_show(task):
    for frames, record in stream(task, count=12, **SETTINGS):
        red = cells(frames, RED)
        question, answer = (message["content"] for message in record["messages"])
        (region,) = record["regions"]
        start, stop = region["time"]
        assert stop == start + 1
        if task == "moving_patch":
            assert None not in red
            assert question[1]["text"].endswith(f"at second {start}?")
            assert answer == ascii_uppercase[red[start]]
        else:
            assert red[:start] == [None] * start
            assert None not in red[start:]
            assert answer == str(start) != "0"
        x0, y0, x1, y1 = region["box"]
        inside = np.asarray(frames[start], dtype=int)[y0:y1, x0:x1]
        assert (np.abs(inside - RED) <= 15).all()
        assert (y0 // CELL) * SIDE + x0 // CELL == red[start]


@pytest.mark.parametrize("task", CLIPS)
def test_patches_step_to_a_cell_beside_and_are_alone_there(task):
    for frames, _ in stream(task, count=12, **SETTINGS):
        paths = [cells(frames, colour) for colour in (RED, *OTHERS)]
        assert sum(set(path) != {None} for path in paths) >= 2
        for path in paths:
            for before, now in pairwise(path):
                if before is not None:
                    places = zip(divmod(before, SIDE), divmod(now, SIDE), strict=True)
                    assert max(abs(a - b) for a, b in places) == 1
        for at_once in zip(*paths, strict=True):
            there = [cell for cell in at_once if cell is not None]
            assert len(set(there)) == len(there)


@pytest.mark.parametrize(("task", "answers"), [("moving_patch", 9), ("appearing_patch", 5)])
def test_no_answer_is_likelier_and_no_clip_in_two_splits(task, answers):
    rng, counts = random.Random(0), Counter()
    for _ in range(100 * answers):
        plan = CLIPS[task].plan(rng, 42, side=3, seconds=6, others=2)
        asked = plan["asked"]
        counts[plan["paths"][0][asked] if task == "moving_patch" else asked] += 1
    assert len(counts) == answers
    assert all(50 < count < 150 for count in counts.values())  # five deviations
    drawn = set()
    for split in SPLITS:
        clips = stream(task, count=3, split=split, **SETTINGS)
        drawn |= {b"".join(frame.tobytes() for frame in frames) for frames, _ in clips}
    assert len(drawn) == 3 * len(SPLITS)


def test_prepare_writes_folders_of_frames_that_load(tmp_path):
    output = tmp_path / "clips.jsonl"
    words = ("--task", *CLIPS, "--count", "2", "--size", "42", "--difficulty", "easy")
    status, samples, rejected = prepared(output, "maps", *words)
    assert (status, rejected, len(samples)) == (0, [], 4)
    for sample in samples:
        example = parse_sample(sample, root=tmp_path, where="x").load()
        (video,) = example.videos
        assert video.times == (0, 1, 2, 3, 4, 5)
        (region,) = example.regions
        assert region.video == 0
        assert region.time == tuple(sample["regions"][0]["time"])
    assert prepared(tmp_path / "b.jsonl", "maps", *words, "--grid", "3x3")[0] != 0


@pytest.mark.parametrize("task", CLIPS)
def test_one_cell_stays_free_for_patches_to_step_into(task):
    """Three others in 2 x 2 cells leave the fourth patch none but its own, and it never ends."""
    settings = {"size": 42, "side": 2, "seconds": 9}
    assert len(list(stream(task, count=20, others=2, **settings))) == 20
    with pytest.raises(ValueError, match="`others`: expected 0 to 2, got 3"):
        next(stream(task, count=1, others=3, **settings))
