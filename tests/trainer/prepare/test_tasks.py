"""Drawn tasks: answers and targets read back from the pixels, splits that share nothing."""

import random
from itertools import pairwise

import numpy as np
import pytest

from groundkern.trainer.data.record import SampleRecord
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.drawing.scenes import RED
from groundkern.trainer.prepare.maps.drawn.lines import crossings
from groundkern.trainer.prepare.maps.tasks import DIFFICULTIES, SPLITS, TASKS, stream

FEW = range(12)


def drawn(name, seed, **options):
    image, sample = TASKS[name](seed, **options)
    return np.asarray(image, dtype=int), sample, sample["messages"][1]["content"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_samples_are_canonical_and_the_same_for_the_same_seed(name, difficulty, tmp_path):
    image, sample = TASKS[name](3, difficulty=difficulty, size=200)
    again, same = TASKS[name](3, difficulty=difficulty, size=200)
    assert image.mode == "RGB"
    assert image.tobytes() == again.tobytes()
    assert sample == same
    assert max(image.size) <= 200
    image.save(tmp_path / "a.png")
    parsed = parse_sample({**sample, "images": ["a.png"]}, root=tmp_path, where="x")
    assert parsed.task == name
    assert SampleRecord.model_validate(sample).messages[1].content


@pytest.mark.parametrize("name", TASKS)
def test_other_seeds_and_splits_draw_other_pictures(name):
    seen = {}
    for split in SPLITS:
        for i, (image, _) in enumerate(
            stream(name, count=20, split=split, difficulty="easy", size=160)
        ):
            seen[image.tobytes()] = (split, i)
    assert len(seen) == 60
    first = [image.tobytes() for image, _ in stream(name, count=2, start=5)]
    assert first == [image.tobytes() for image, _ in stream(name, count=7)][5:]
    assert first[0] != next(stream(name, count=1, start=5, seed=1))[0].tobytes()


@pytest.mark.parametrize("name", TASKS)
def test_a_plan_belongs_to_one_split(name):
    """Whatever the seeds: the plan decides. Here all splits start from the same generator."""
    task, plans = TASKS[name], {}
    for split in SPLITS:
        kept = []
        task_with_record = type(task)(name, _recording(task.plan, kept), task.draw, task.settings)
        for seed in FEW:
            task_with_record(seed, split=split, difficulty="easy", size=128)
            plans.setdefault(split, set()).add(repr(kept[-1]))
    assert not plans["train"] & plans["test"]
    assert not plans["train"] & plans["val"]
    assert not plans["val"] & plans["test"]


def _recording(plan, kept):
    def record(*args, **kwargs):
        kept.append(plan(*args, **kwargs))
        return kept[-1]

    return record


@pytest.mark.parametrize("seed", FEW)
def test_lines_cross_as_often_as_the_answer_says(seed):
    """Counted in the pixels: how often red and blue change sides from column to column."""
    pixels, sample, answer = drawn("line_intersection", seed, difficulty=DIFFICULTIES[seed % 3])
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    sides = []
    rows = np.arange(len(pixels))[:, None]
    for is_line in ((red > blue + 100), (blue > red + 100)):
        count = is_line.sum(0)
        sides.append(np.where(count > 0, (is_line * rows).sum(0) / np.maximum(count, 1), np.nan))
    difference = sides[0] - sides[1]
    apart = difference[np.abs(difference) > 5]
    assert sum(a * b < 0 for a, b in pairwise(apart)) == int(answer)
    points = sample["regions"][0]["points"] if sample["regions"] else []
    assert len(points) == int(answer)
    for x, y in points:
        around = np.s_[int(y) - 6 : int(y) + 7, int(x) - 6 : int(x) + 7]
        assert (red[around] > blue[around] + 100).any()
        assert (blue[around] > red[around] + 100).any()
    assert green.min() < 100


def test_crossings_by_hand():
    first, second = [(0, 0), (10, 10), (20, 10)], [(0, 10), (10, 0), (20, 0)]
    assert crossings(first, second) == [[5, 5]]
    assert crossings([(0, 0), (30, 30)], [(0, 20), (30, 10)]) == [[15, 15]]
    assert crossings([(0, 0), (10, 1)], [(0, 5), (10, 6)]) == []


def test_all_answers_come_up():
    samples = {n: [s for _, s in stream(n, count=60, size=160)] for n in TASKS}
    answers = {n: [s["messages"][1]["content"] for s in samples[n]] for n in TASKS}
    assert set(answers["line_intersection"]) == set("01234")
    assert set(answers["line_tracing"]) == set("1234")
    assert len(set(answers["grid_patch"])) > 30
    assert len(set(answers["word_page"])) == 60


@pytest.mark.parametrize("seed", FEW)
def test_the_traced_line_is_ink_from_its_letter_to_its_number(seed):
    pixels, sample, answer = drawn("line_tracing", seed, difficulty=DIFFICULTIES[seed % 3])
    letter = sample["messages"][0]["content"][1]["text"].split("from ")[1][0]
    words = {word["text"]: word["box"] for word in sample["words"]}
    (region,) = sample["regions"]
    path = region["polyline"]
    for (x, y), name in ((path[0], letter), (path[-1], answer)):
        x0, y0, x1, y1 = words[name]
        assert y0 - 3 <= y <= y1 + 3
        assert min(abs(x - x1), abs(x - x0)) < pixels.shape[1] / 10
    assert path[0][0] < path[-1][0]
    for (ax, ay), (bx, by) in pairwise(path):
        assert ax < bx
        for t in (0.25, 0.5, 0.75):
            x, y = ax + t * (bx - ax), ay + t * (by - ay)
            assert pixels[int(y), int(x)].max() < 128
    assert sorted(int(name) for name in words if name.isdecimal()) == [
        *range(1, len(words) // 2 + 1)
    ]


@pytest.mark.parametrize("seed", FEW)
def test_the_named_patch_is_the_red_one(seed):
    pixels, sample, answer = drawn("grid_patch", seed, difficulty=DIFFICULTIES[seed % 3])
    side = TASKS["grid_patch"].settings[DIFFICULTIES[seed % 3]]["side"]
    cell = len(pixels) // side
    centres = pixels[cell // 2 :: cell, cell // 2 :: cell]
    redness = np.abs(centres - np.array(RED)).sum(-1)
    row, column = np.unravel_index(redness.argmin(), redness.shape)
    assert answer == f"row {row + 1} column {column + 1}"
    box = [column * cell, row * cell, (column + 1) * cell, (row + 1) * cell]
    spans = [answer[slice(*region["char_span"])] for region in sample["regions"]]
    assert spans == [str(row + 1), str(column + 1)]
    assert all(region["box"] == box for region in sample["regions"])


@pytest.mark.parametrize("cell", [14, 28, 32, 56])
def test_words_end_in_cells_of_their_own_and_make_up_the_lines(cell):
    _, sample, answer = drawn("word_page", 5, cell=cell)
    (region,) = sample["regions"]
    assert region["text"] == answer
    corners = [(int(w["box"][3] // cell), int(w["box"][2] // cell)) for w in sample["words"]]
    assert corners == sorted(set(corners))
    line = int(region["box"][1] // cell)
    assert " ".join(w["text"] for w in sample["words"] if w["box"][1] // cell == line) == answer


def test_the_line_asked_for_is_the_one_of_its_number_and_none_is_highlighted():
    asked = set()
    for seed in range(12):
        pixels, sample, answer = drawn("asked_line", seed, size=112, cell=28)
        (region,) = sample["regions"]
        number = int(sample["messages"][0]["content"][-1]["text"].removeprefix("Read line ")[:-1])
        lines: dict[int, list[str]] = {}
        for word in sample["words"]:
            lines.setdefault(int(word["box"][1] // 28), []).append(word["text"])
        assert " ".join(lines[number - 1]) == answer == region["text"]
        assert int(region["box"][1] // 28) == number - 1
        corners = pixels[::28, 0]  # above and left of every line's ink
        assert (corners == corners[0]).all()
        asked.add(number)
    assert asked == {1, 2, 3, 4}


def test_words_of_a_page_say_nothing_of_each_other():
    """Drawn independently: over many pages, neighbours repeat as often as chance has it."""
    rng = random.Random(0)
    words = [w for _ in range(30) for w in TASKS["word_page"].plan(rng, 448, cell=28)["words"]]
    repeats = sum(a == b for a, b in pairwise(words))
    assert repeats <= 5 * len(words) / len(set(words))
    assert len(set(words)) > 300


@pytest.mark.parametrize("seed", FEW)
def test_the_two_objects_are_there_exactly_if_the_answer_is_yes(seed):
    """By their colours in the pixels; a missing one's colour and shape are still in the drawing."""
    difficulty = DIFFICULTIES[seed % 3]
    pixels, sample, answer = drawn("two_objects", seed, size=240, difficulty=difficulty)
    plans = []
    task = TASKS["two_objects"]
    recording = type(task)(task.name, _recording(task.plan, plans), task.draw, task.settings)
    recording(seed, size=240, difficulty=difficulty)
    shown, both = plans[-1]["shown"], answer.split(":")[0]
    parts = [answer[slice(*phrase["char_span"])] for phrase in sample["phrases"]]
    assert parts == [both, *both.split(" and ")]
    found = {answer[slice(*region["char_span"])] for region in sample["regions"]}
    for part, phrase in zip(parts[1:], sample["phrases"][1:], strict=True):
        _, colour, shape = part.split()
        assert phrase["subject"] == shape
        assert ((colour, shape) in shown) == (part in found)
        assert colour in {c for c, _ in shown}
        assert shape in {s for _, s in shown}
    assert answer == f"{both}: {'yes' if found == set(parts[1:]) else 'no'}"
    strongest = {"red": 0, "green": 1, "blue": 2}
    for region in sample["regions"]:
        x0, y0, x1, y1 = region["box"]
        middle = pixels[(y0 + 2 * y1) // 3, (x0 + x1) // 2]
        colour = answer[slice(*region["char_span"])].split()[1]
        assert middle.argmax() == strongest[colour]


def test_half_of_the_two_objects_are_there_and_a_page_has_few_words_if_asked():
    answers = [s["messages"][1]["content"] for _, s in stream("two_objects", count=200, size=64)]
    assert 75 < sum(answer.endswith("yes") for answer in answers) < 125
    pages = stream("word_page", count=40, size=112, cell=28, vocabulary=7)
    assert len({word["text"] for _, page in pages for word in page["words"]}) == 7


@pytest.mark.parametrize("seed", FEW)
def test_pointing_gives_the_middle_of_each_objects_cell(seed):
    """In percent of the image; by the pixels there, and no other object of its kind."""
    asked = 1 + seed % 2
    own = {"objects": 6, "side": 4, "asked": asked}
    pixels, sample, answer = drawn("pointing", seed, size=160, **own)
    names, places = answer.split(": ")
    assert sample["messages"][0]["content"][-1]["text"] == f"Point to {names}."
    parts = names.split(" and ")
    assert len(parts) == len(places.split(", ")) == asked
    spans = [answer[slice(*phrase["char_span"])] for phrase in sample["phrases"]]
    assert spans == ([names, *parts] if asked == 2 else parts)
    strongest = {"red": 0, "green": 1, "blue": 2}
    for number, (part, place) in enumerate(zip(parts, places.split(", "), strict=True)):
        column, row = (int(value) * 160 // 100 // 40 for value in place.split())
        for region, value in zip(sample["regions"][2 * number :], place.split(), strict=False):
            assert answer[slice(*region["char_span"])] == value
            x0, y0, x1, y1 = region["box"]
            assert (x0 // 40, y0 // 40, (x1 - 1) // 40, (y1 - 1) // 40) == (column, row) * 2
        _, colour, shape = part.split()
        cell = pixels[row * 40 : row * 40 + 40, column * 40 : column * 40 + 40]
        ink = (cell != 255).any(-1)
        assert (cell[ink].argmax(-1) == strongest[colour]).all()
        side = x1 + 1 - x0
        filled = {"circle": 0.785, "square": 1.0, "triangle": 0.5}[shape]
        assert abs(ink.sum() / side**2 - filled) < 0.06


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_chart_says_the_values_asked_for_and_bars_are_as_long_as_they_are(asked):
    for seed in range(8):
        pixels, sample, answer = drawn("bar_chart", seed, size=280, bars=4, names=9, asked=asked)
        words = [word["text"] for word in sample["words"]]
        shown = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        question = sample["messages"][0]["content"][-1]["text"]
        named = question[:-1].split(" of ")[1].replace(" and ", ", ").split(", ")
        assert question.startswith("What is the value of " if asked == 1 else "What are the values")
        assert len(set(named)) == len(sample["regions"]) == asked
        pairs = ", ".join(f"{name} {shown[name]}" for name in named)
        assert answer == (str(shown[named[0]]) if asked == 1 else pairs)
        boxes = [word["box"] for word in sample["words"]]
        for region, name in zip(sample["regions"], named, strict=True):
            assert answer[slice(*region["char_span"])] == str(shown[name])
            assert region["box"] == boxes[words.index(name) + 1]
        hue = pixels[14::28, 3 * 28 + 1]  # the middle of each bar, at the axis
        assert (hue == hue[0]).all()
        lengths = [(row[3 * 28 :] == hue[0]).all(-1).sum() for row in pixels[14::28]]
        longest = max(shown.values())
        for length, value in zip(lengths, shown.values(), strict=True):
            assert abs(length - max(2, 5 * 28 * value / longest)) <= 1


def test_the_value_of_a_coloured_bar_is_printed_beside_it():
    hues = set()
    for seed in range(12):
        pixels, sample, answer = drawn("coloured_bars", seed, size=84, bars=3)
        question = sample["messages"][0]["content"][-1]["text"]
        colour = question.removeprefix("What is the value of the ").removesuffix(" bar?")
        (region,) = sample["regions"]
        row = int(region["box"][1] // 28)
        assert answer[slice(*region["char_span"])] == answer == sample["words"][row]["text"]
        assert sample["words"][row]["box"] == region["box"]
        middle = pixels[14::28, 1]
        assert len({tuple(hue) for hue in middle}) == len(sample["words"]) == 3
        hues.add((colour, tuple(middle[row])))
        values = [int(word["text"]) for word in sample["words"]]
        lengths = [(line == line[1]).all(-1)[:56].sum() for line in pixels[14::28]]
        longest = max(values)
        for length, value in zip(lengths, values, strict=True):
            assert abs(length - max(2, 28 * value / longest)) <= 1
    assert len(hues) == len({colour for colour, _ in hues}) == len({hue for _, hue in hues}) > 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coloured_bars", {"bars": 7}, "`bars`: expected 1 to 6, got 7"),
        ("coloured_bars", {"largest": 2}, "`largest`: expected 4 to 99, got 2"),
        ("pointing", {"objects": 1, "asked": 2}, "`objects`: expected 2 to 25, got 1"),
        ("pointing", {"asked": 3}, "`asked`: expected 1 to 2, got 3"),
        ("bar_chart", {"bars": 2, "asked": 3}, "`asked`: expected 1 to 2, got 3"),
        ("bar_chart", {"bars": 50}, "`bars`: expected 1 to 44, got 50"),
        ("bar_chart", {"names": 2}, "`names`: expected 5 to"),
        ("bar_chart", {"largest": 100}, "`largest`: expected 5 to 99, got 100"),
        ("two_objects", {"objects": 2}, "`objects`: expected 3 to 9, got 2"),
        ("two_objects", {"side": 90}, "`side`: expected 2 to 28, got 90"),
        ("grid_patch", {"split": "dev"}, "`split`: expected one of train, val, test, got 'dev'"),
        ("grid_patch", {"difficulty": "x"}, "`difficulty`: expected one of easy, medium, hard"),
        ("grid_patch", {"lines": 3}, "`setting`: expected one of side, got 'lines'"),
        ("grid_patch", {"size": 10}, "`size`: expected 64 to 4096, got 10"),
        ("grid_patch", {"size": 1 << 20}, "`size`: expected 64 to 4096"),
        ("grid_patch", {"side": 2.5}, "`side`: expected a positive whole number, got 2.5"),
        ("grid_patch", {"side": 1000}, "`side`: expected 2 to 112, got 1000"),
        ("line_tracing", {"lines": 30}, "`lines`: expected 2 to 9"),
        ("line_tracing", {"steps": 300}, "`steps`: expected 1 to 28"),
        ("line_intersection", {"segments": 30}, "`segments`: expected 1 to 18"),
        ("word_page", {"cell": 5}, "`cell`: expected 14 to 224"),
    ],
)
def test_settings_that_cannot_be_drawn(name, options, message):
    with pytest.raises(ValueError, match=message):
        TASKS[name](0, **options)
