"""The demo: true boxes, the same bytes for the same seed, and files a user's own run could take."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from groundkern.hf.data.processor import load_processor
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.demo import generate as demo
from groundkern.trainer.demo.__main__ import main
from groundkern.trainer.drawing import texts
from groundkern.trainer.drawing.scenes import (
    CELL,
    MARKER,
    RED,
    bar_chart,
    font,
    patch_grid,
    word_page,
)

FEW = {"pointing": 6, "page": 3, "chart": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.HELD_OUT, "pointing", 6)
        patch.setitem(demo.HELD_OUT, "page", 3)
        patch.setitem(demo.HELD_OUT, "chart", 3)
        main([str(folder), "--samples", "24", "--seed", "3"])
    return folder


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_every_sample_passes_the_checks_of_users_data(folder, split):
    dataset = JsonLinesDataset(folder / f"{split}.jsonl", on_bad_sample="stop")
    assert len(dataset) == {"train": 24, "dev": 12, "test": 12}[split]
    for i in range(len(dataset)):
        example = dataset[i]
        assert example.regions
        assert (dataset.tasks[i] == "pointing") == (not example.words)
    counts = {"train": (9, 6, 9), "dev": (6, 3, 3), "test": (6, 3, 3)}[split]
    assert tuple(dataset.tasks.count(task) for task in demo.TASKS) == counts


def test_same_seed_same_files_other_seed_others(folder, tmp_path):
    for seed in (3, 4):
        demo.generate(tmp_path / str(seed), samples=24, seed=seed, held_out=FEW)
    names = [
        "train.jsonl",
        "dev.jsonl",
        "test.jsonl",
        *(f"images/train-{i:05d}.png" for i in range(24)),
    ]
    same = [(folder / n).read_bytes() == (tmp_path / "3" / n).read_bytes() for n in names]
    assert all(same)
    assert (folder / names[0]).read_bytes() != (tmp_path / "4" / names[0]).read_bytes()


def content(folder, split: str) -> list:
    """What is on each picture of a split: the words of pages and charts, the pixels of grids."""
    dataset, found = JsonLinesDataset(folder / f"{split}.jsonl"), []
    for i, sample in enumerate(read(folder / f"{split}.jsonl")):
        words = tuple(word["text"] for word in sample["words"])
        found.append(words or np.asarray(dataset[i].images[0]).tobytes())
    return found


def test_train_dev_and_test_share_no_page_chart_or_drawing(folder):
    train, dev, test = (content(folder, split) for split in ("train", "dev", "test"))
    assert not set(train) & {*dev, *test}
    assert not set(dev) & set(test)
    assert len(set(test)) == len(test)


def test_many_pages_of_few_passages_are_still_of_other_passages(tmp_path):
    """558 passages in all: drawn without a look at the others, nearly every one would repeat."""
    turns = {"page": 1, "pointing": 0, "chart": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SHARES", turns)
        demo.generate(tmp_path, samples=50, held_out={"page": 40})
    train, dev, test = (
        [tuple(word["text"] for word in sample["words"]) for sample in read(tmp_path / name)]
        for name in ("train.jsonl", "dev.jsonl", "test.jsonl")
    )
    assert not set(train) & {*dev, *test}
    assert not set(dev) & set(test)
    assert len(set(test)) == len(test) == 40


def test_dev_holds_the_samples_that_settings_were_chosen_on(tmp_path):
    demo.generate(tmp_path, samples=1, held_out=FEW)
    for i, sample in enumerate(read(tmp_path / "dev.jsonl")):
        picture, _ = demo.TASKS[sample["task"]](random.Random(f"0 test {i}"))  # as they were drawn
        drawn = JsonLinesDataset(tmp_path / "dev.jsonl")[i].images[0]
        assert np.array_equal(np.asarray(drawn), np.asarray(picture.image))


def test_more_held_out_samples_than_there_are_is_said(tmp_path, monkeypatch):
    one = demo.pointing(random.Random(0))
    monkeypatch.setitem(demo.TASKS, "pointing", lambda rng: one)
    with pytest.raises(ValueError, match="`held_out`: expected fewer samples of pointing"):
        demo.generate(tmp_path, samples=1, held_out={"pointing": 1})


def test_pointing_names_the_red_patch(folder):
    samples = [s for s in read(folder / "train.jsonl") if s["task"] == "pointing"]
    dataset = JsonLinesDataset(folder / "train.jsonl")
    for i, sample in enumerate(read(folder / "train.jsonl")):
        if sample not in samples:
            continue
        _, row, _, column = sample["messages"][1]["content"].split()
        pixels = np.asarray(dataset[i].images[0], dtype=int)
        cells = pixels[CELL // 2 :: CELL, CELL // 2 :: CELL]
        redness = np.abs(cells - np.array(RED)).sum(-1)
        assert np.unravel_index(redness.argmin(), redness.shape) == (int(row) - 1, int(column) - 1)
        assert len(sample["regions"]) == 2
        answer = sample["messages"][1]["content"]
        spans = [answer[slice(*region["char_span"])] for region in sample["regions"]]
        assert spans == [row, column]


def _ink(image, box) -> tuple[int, int]:
    """Dark pixels inside and outside a box, on a light page."""
    pixels = np.asarray(image.convert("L")) < 128
    x0, y0, x1, y1 = (int(edge) for edge in box)
    inside = int(pixels[y0:y1, x0:x1].sum())
    return inside, int(pixels.sum()) - inside


@pytest.mark.parametrize("word", ["which", "Jabberwocky", "to", "(as", "it,"])
def test_word_box_holds_all_of_the_ink_and_ends_in_its_last_cell(word):
    page = word_page([word], random.Random(0), columns=8, rows=2)
    ((text, box),) = page.words
    inside, outside = _ink(page.image, box)
    assert text == word
    assert inside > 10
    assert outside == 0
    assert box[2] - box[0] <= font(13).getlength(word) + 2
    assert CELL // 2 < box[2] % CELL < CELL
    assert box[3] < CELL


def test_page_keeps_order_and_stops_at_its_last_line():
    words = texts.texts()[0]
    page = word_page(words, random.Random(0), columns=8, rows=3)
    drawn = [text for text, _ in page.words]
    assert drawn == words[: len(drawn)]
    assert len(page.boxes) == 3
    assert " ".join(line for line, _ in page.boxes) == " ".join(drawn)
    corners = [(int(box[3] // CELL), int(box[2] // CELL)) for _, box in page.words]
    assert corners == sorted(set(corners))


def test_highlighted_line_is_the_answer(folder):
    dataset = JsonLinesDataset(folder / "train.jsonl")
    seen = 0
    for i, sample in enumerate(read(folder / "train.jsonl")):
        if sample["task"] == "pointing":
            continue
        pixels = np.asarray(dataset[i].images[0])
        marked = (pixels == np.array(MARKER)).all(-1).mean(1) > 0.4
        (region,) = sample["regions"]
        _, y0, _, y1 = region["box"]
        row = int(y0 // CELL)
        assert np.flatnonzero(marked).min() >= row * CELL
        assert np.flatnonzero(marked).max() < (row + 1) * CELL
        assert y1 <= (row + 1) * CELL
        inside = [
            w["text"] for w in sample["words"] if row * CELL <= w["box"][1] < (row + 1) * CELL
        ]
        separator = " " if sample["task"] == "page" else ", "
        assert separator.join(inside) == sample["messages"][1]["content"] == region["text"]
        seen += 1
    assert seen == 15


def test_every_passage_fills_its_page():
    """Pages start at most 40 words before a text's end."""
    for words in texts.texts():
        page = word_page(words[-41:], random.Random(0), columns=8, rows=demo.LINES)
        assert len(page.boxes) == demo.LINES


def test_bars_are_in_proportion_and_boxes_hold_name_bar_and_value():
    rows = [("Earth", "200"), ("Mars", "100"), ("Venus", "50")]
    chart = bar_chart(rows, random.Random(0))
    pixels = np.asarray(chart.image, dtype=int)
    lengths = []
    for i, (name, (x0, y0, x1, y1)) in enumerate(chart.boxes):
        line = pixels[i * CELL + 7]
        hue = pixels[7, 3 * CELL]
        lengths.append(int((line == hue).all(-1).sum()))
        name_box, value_box = chart.words[2 * i][1], chart.words[2 * i + 1][1]
        assert name == rows[i][0]
        assert (chart.words[2 * i][0], chart.words[2 * i + 1][0]) == rows[i]
        assert x0 == name_box[0]
        assert x1 >= max(value_box[2], 3 * CELL + lengths[-1])
        assert i * CELL <= y0 < y1 <= (i + 1) * CELL
    assert lengths[0] == 2 * lengths[1] == 4 * lengths[2] > 0


@pytest.mark.parametrize("place", [(1, 1), (5, 5), (2, 4)])
def test_patch_grid_box_is_the_red_cell(place):
    picture = patch_grid(*place, random.Random(1))
    ((name, box),) = picture.boxes
    assert name == "red"
    assert box == (CELL * (place[1] - 1), CELL * (place[0] - 1), CELL * place[1], CELL * place[0])
    assert picture.image.size == (5 * CELL, 5 * CELL)


def test_shipped_data_is_whole():
    assert len(texts.texts()) == 7
    tables = {quantity: dict(rows) for _, quantity, rows in texts.tables()}
    assert tables["mean radius (km)"]["Earth"] == "6371.0"
    assert tables["population (million)"]["1790"] == "3.9"
    assert len(tables["population (million)"]) == 24
    assert tables["atomic weight (u)"]["Gold"] == "196.97"
    assert all(float(value) > 0 for rows in tables.values() for value in rows.values())
    named = (texts.DATA / "README.md").read_text()
    files = [path.name for path in texts.DATA.iterdir() if path.suffix in (".txt", ".csv")]
    assert all(f"| {name} |" in named for name in files)
    assert len(files) == 11


def test_every_bar_fits_its_chart():
    """The longest name and value of every table, with the longest bar."""
    for _, _, rows in texts.tables():
        for start in range(0, len(rows), 5):
            chart = bar_chart(rows[start : start + 5], random.Random(0))
            for _, (x0, _, x1, _) in chart.words + chart.boxes:
                assert 0 <= x0 < x1 <= chart.image.width


def test_model_loads_like_a_users_and_reads_a_sample(folder):
    processor = load_processor(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    example = JsonLinesDataset(folder / "test.jsonl")[0]
    text = processor.apply_chat_template(example.messages, tokenize=False)
    batch = processor(text=[text], images=list(example.images), return_tensors="pt")
    seen = int((batch["input_ids"] == model.config.image_token_id).sum())
    width, height = example.images[0].size
    assert seen == (width // CELL) * (height // CELL)
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[-1] == len(processor.tokenizer) >= int(batch["input_ids"].max())
    assert logits.isfinite().all()


def test_tokenizer_digits_are_tokens_and_text_survives(folder):
    tokenizer = load_processor(folder / "model").tokenizer
    assert tokenizer.tokenize("row 3 column 25") == ["row", "Ġ", "3", "Ġcolumn", "Ġ", "2", "5"]
    assert [tokenizer.tokenize(digit) for digit in "0123456789"] == [[d] for d in "0123456789"]
    for text in ['Alice was; "quoted" -- 3.14', "naïve ☕"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_model_is_the_same_for_the_same_seed(folder, tmp_path):
    from groundkern.trainer.demo.model import save_model

    save_model(tmp_path, demo.corpus(seed=3), seed=3)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (folder / "model" / name).read_bytes()


@pytest.mark.parametrize("samples", ["0", "-1", "x"])
def test_bad_count(samples, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--samples", samples])
    assert f"expected a positive whole number, got '{samples}'" in capsys.readouterr().err


def test_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "file"), "--samples", "1"])
    assert "file: " in capsys.readouterr().err
