"""`prepare words`: engines, what is kept, samples with words already, folders; the round trip."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import types
from collections import Counter
from itertools import pairwise

import pytest
from PIL import Image

from groundkern.hf.data.labels import WordEncoder
from groundkern.hf.data.words import WordLabeler
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.drawing.texts import texts
from groundkern.trainer.prepare.grid import visual_grid
from groundkern.trainer.prepare.ocr import engines
from groundkern.trainer.prepare.ocr.reading import read_words
from groundkern.trainer.prepare.ocr.settings import OcrSettings, OcrWord
from groundkern.trainer.prepare.words import ReadWords, Rules
from groundkern.trainer.program import main
from tests.trainer.prepare.records import lines_of, readings, sample

needs_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="the program tesseract is not installed"
)


@pytest.fixture
def found(monkeypatch):
    """An engine that reads what the test says: (text, box, confidence, line) tuples."""
    words: list[tuple] = []
    monkeypatch.setattr(engines, "engine", lambda settings: lambda image: words)
    return words


def read(write, *records, **options):
    from groundkern.trainer.prepare.pipeline import prepare
    from groundkern.trainer.prepare.sources import json_lines

    path = write(*records)
    work = ReadWords(path.parent, readings(path.parent), **options)
    output = path.parent / "out.jsonl"
    out = prepare(json_lines(path), work, output=output, settings={"command": "words"})
    return out, lines_of(output)


def test_words_are_added_above_the_confidence(write, found):
    found += [OcrWord("Total", (1, 2, 30, 12), 0.9, 0), OcrWord("~", (40, 2, 44, 12), 0.2, 0)]
    out, (made,) = read(write, sample(task="t"))
    assert made == sample(task="t", words=[{"text": "Total", "box": [1.0, 2.0, 30.0, 12.0]}])
    assert out.counts["words_unsure"] == 1


def test_boxes_are_kept_within_the_image_and_empty_ones_dropped(found):
    found += [
        OcrWord(" a ", (-3, 0, 200, 20), 1.0, 0),
        OcrWord("b", (5, 5, 5, 9), 1.0, 0),
        OcrWord(" ", (1, 1, 2, 2), 1.0, 1),
    ]
    (word,) = read_words(Image.new("RGB", (100, 50)), OcrSettings(scale=2))
    assert word == ("a", (0.0, 0.0, 100.0, 10.0), 1.0, 0, 0)


def test_large_images_are_not_enlarged_beyond_a_limit(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        engines, "engine", lambda settings: lambda image: sizes.append(image.size) or []
    )
    for size in ((300, 100), (3000, 100), (5000, 100)):
        read_words(Image.new("RGB", size), OcrSettings(scale=2))
    assert sizes == [(600, 200), (4000, 133), (5000, 100)]


def test_several_images_and_words_that_were_there(write, found):
    found.append(OcrWord("one", (0, 0, 28, 28), 1.0, 0))
    two = {**sample(), "images": ["a.png", "a.png"]}
    old = sample(words=[{"text": "old", "box": [0, 0, 5, 5]}])
    out, made = read(write, two, old, sample(image=None))
    assert [word["image"] for word in made[0]["words"]] == [0, 1]
    assert made[1:] == [old, sample(image=None)]
    assert out.counts["samples_without_images"] == 1
    assert out.counts["samples_with_words_before"] == 1
    assert out.counts["samples_read"] == 1


def test_only_words_that_label_a_visual_token_with_a_model(write, found, model):
    """The papers' rules: bottom-right corner, tokens, height, shared visual tokens."""
    found += [
        OcrWord("the", (0, 0, 28, 20), 1.0, 0),  # shares its token with the next
        OcrWord("of", (2, 2, 20, 20), 1.0, 0),
        OcrWord("and", (30, 2, 50, 20), 1.0, 0),
        OcrWord("Zqxjvkwbz", (2, 30, 20, 50), 1.0, 1),  # many tokens
        OcrWord("to", (30, 30, 50, 50), 1.0, 1),
    ]
    out, (made,) = read(write, sample(), rules=Rules(model))
    assert [word["text"] for word in made["words"]] == ["and", "to"]
    names = ("visual_tokens", "words_read", "words_shared_token", "words_dropped_long")
    assert [out.counts[name] for name in names] == [4, 5, 2, 1]
    out.path.unlink()
    out.record.unlink()
    _, (made,) = read(write, sample(), rules=Rules(model, on_shared_token="largest"))
    assert [word["text"] for word in made["words"]] == ["the", "and", "to"]


def test_an_image_that_the_model_or_the_engine_refuses_is_rejected(
    write, found, model, monkeypatch
):
    path = write(sample(image="thin.png"), sample())
    Image.new("RGB", (4, 800)).save(path.parent / "thin.png")

    def fail(image):
        raise SampleError("tesseract failed: no reason")

    monkeypatch.setattr(engines, "engine", lambda settings: fail)
    out, made = read(write, sample())
    assert made == []
    (rejected,) = lines_of(out.rejects)
    assert rejected["where"] == "data.jsonl:1"
    assert "`images[0]`: expected an image that can be read" in rejected["reason"]
    assert rejected["original"] == sample()


def test_missing_engines_are_one_sentence(monkeypatch, write, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="tesseract is not installed"):
        engines.engine(OcrSettings("tesseract", language="none"))
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    assert (
        main(["prepare", "words", str(write(sample())), "--output", "x", "--engine", "paddle"]) == 2
    )
    assert "PaddleOCR is not installed" in capsys.readouterr().err


@pytest.fixture
def paddle(monkeypatch, tmp_path):
    """Puts a class in the place of PaddleOCR; the folder in which it would keep its models."""

    def install(paddle_ocr: type) -> None:
        paddle_ocr._get_ocr_model_names = lambda self, language, version: {
            "en": ("detector", "recogniser")
        }.get(language, (None, None))
        package, cache = types.ModuleType("paddleocr"), types.ModuleType("paddlex.utils.cache")
        package.PaddleOCR, cache.CACHE_DIR = paddle_ocr, str(tmp_path)
        monkeypatch.setitem(sys.modules, "paddleocr", package)
        monkeypatch.setitem(sys.modules, "paddlex", types.ModuleType("paddlex"))
        monkeypatch.setitem(sys.modules, "paddlex.utils", types.ModuleType("paddlex.utils"))
        monkeypatch.setitem(sys.modules, "paddlex.utils.cache", cache)
        engines.engine.cache_clear()

    yield install, tmp_path / "official_models"
    engines.engine.cache_clear()


def test_paddle_without_its_models_is_refused_before_it_fetches_them(paddle):
    class PaddleOCR:
        def __init__(self, **options):
            raise AssertionError("it would go to the network")

    install, models = paddle
    install(PaddleOCR)
    said = f"nothing is downloaded: the folder detector is wanted in {models}"
    with pytest.raises(ConfigError, match=re.escape(said)):
        engines.engine(OcrSettings("paddle"))
    (models / "detector").mkdir(parents=True)
    with pytest.raises(ConfigError, match="the folder recogniser is wanted in"):
        engines.engine(OcrSettings("paddle"))
    with pytest.raises(ConfigError, match="PaddleOCR does not read the language 'klingon'"):
        engines.engine(OcrSettings("paddle", language="klingon"))


def test_paddle_words_are_joined_to_what_people_call_words(paddle):
    """A line as PaddleX 3.7 returns it: split at punctuation, symbols with their spaces."""
    pieces = ["Total", ": ", "1", ",", "234", " (", "net", ")", "中", "文"]
    edges = [0, 50, 70, 80, 85, 110, 130, 160, 170, 180, 190]
    regions = [[(a, 0), (b, 0), (b, 10), (a, 10)] for a, b in pairwise(edges)]
    line = {
        "rec_texts": ["Total: 1,234 (net)中文"],
        "rec_scores": [0.75],
        "text_word": [pieces],
        "text_word_region": [regions],
    }

    class PaddleOCR:
        def __init__(self, **options):
            assert options["return_word_box"]
            assert options["text_recognition_model_name"] == "recogniser"
            assert options["text_recognition_model_dir"] == str(models / "recogniser")

        def predict(self, pixels):
            if pixels.shape[0] < 20:
                raise KeyError("text_word_region")  # what it does on a blank image
            return [line]

    install, models = paddle
    install(PaddleOCR)
    for name in ("detector", "recogniser"):
        (models / name).mkdir(parents=True)
    settings = OcrSettings("paddle", rotation=False)
    words = read_words(Image.new("RGB", (200, 40)), settings)
    assert [word.text for word in words] == ["Total:", "1,234", "(net)", "中", "文"]
    assert words[1].box == (70, 0, 110, 10)
    assert {word.confidence for word in words} == {0.75}
    assert read_words(Image.new("RGB", (200, 10)), settings) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_told_and_the_same_command_continues(write, found, monkeypatch, capsys, number):
    path = write(*(sample(str(n), image=f"{n}.png") for n in range(4)))
    for n in range(4):
        Image.new("RGB", (56, 56), (n, n, n)).save(path.parent / f"{n}.png")
    read = []

    def engine(image):
        read.append(image)
        if len(read) == 3:
            os.kill(os.getpid(), number)
        return [OcrWord("word", (1, 1, 5, 5), 1.0, 0)]

    monkeypatch.setattr(engines, "engine", lambda settings: engine)
    output = path.parent / "out.jsonl"
    words = ["prepare", "words", str(path), "--output", str(output), "--workers", "1"]
    assert main(words) == 128 + number
    told = capsys.readouterr().err
    assert f"Stopped by {number.name}: saved in {output}.prepare.json; the same" in told
    assert not output.exists()
    assert main(words) == 0
    assert len(read) == 5  # the third was read twice
    assert [record["messages"][1]["content"] for record in lines_of(output)] == list("0123")


def test_a_full_disk_is_one_sentence(write, found, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = write(sample())
    monkeypatch.setattr("groundkern.trainer.prepare.output.Output.write", full)
    words = ["prepare", "words", str(path), "--output", str(path.parent / "out.jsonl")]
    assert main([*words, "--workers", "1"]) == 1
    assert "No space left on device; the same command continues" in capsys.readouterr().err


@needs_tesseract
def test_a_language_without_data_is_one_sentence():
    with pytest.raises(ConfigError, match="no data for the language 'tlh'"):
        engines.engine(OcrSettings("tesseract", language="eng+tlh"))


def labels(path, grid) -> list[set]:
    """(visual token, label) pairs of each sample, by the rules of training."""
    labeler, found = WordLabeler(WordEncoder(grid.processor.tokenizer)), []
    for line in path.open("rb"):
        made = parse_sample(line, root=path.parent, where="")
        placed = labeler.place(made.words, grid.table(*made.sizes), Counter())
        found.append({(label.token, label.labels) for label in placed})
    return found


@needs_tesseract
def test_words_find_rendered_words_on_their_visual_tokens(tmp_path, model, capsys):
    """Clean pages of the default font size: at least 90 % of the labels at the right token."""
    rows = [{"text": " ".join(words[:110])} for words in texts()[:2]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(model), "--workers", "1", "--output"]
    pages, back = tmp_path / "pages.jsonl", tmp_path / "back.jsonl"
    assert main(["prepare", "render", str(tmp_path / "texts.jsonl"), *common, str(pages)]) == 0
    assert main(["prepare", "words", str(pages), "--replace", *common, str(back)]) == 0
    assert "coverage" in capsys.readouterr().out
    grid = visual_grid(model)
    truth, found = labels(pages, grid), labels(back, grid)
    wanted = sum(map(len, truth))
    assert wanted > 140
    assert sum(len(a & b) for a, b in zip(truth, found)) / wanted >= 0.9


@needs_tesseract
def test_a_folder_of_images_becomes_samples(tmp_path, model):
    rows = tmp_path / "texts.jsonl"
    rows.write_text(json.dumps({"text": "Alice was beginning to get very tired"}) + "\n")
    main(["prepare", "render", str(rows), "--workers", "1", "--output", str(tmp_path / "p.jsonl")])
    Image.new("RGB", (64, 64), "white").save(tmp_path / "p" / "blank.png")
    (tmp_path / "p" / "notes.txt").write_text("no image")
    output = tmp_path / "out.jsonl"
    words = ["prepare", "words", str(tmp_path / "p"), "--workers", "1", "--output", str(output)]
    assert main(words) == 0
    (made,) = lines_of(output)
    assert made["images"] == ["0000/0000000-0.png"]
    read = [word["text"] for word in made["words"]]
    assert read[:3] == ["Alice", "was", "beginning"]
    assert made["messages"][1]["content"] == " ".join(read)
    (rejected,) = lines_of(tmp_path / "out.jsonl.rejected.jsonl")
    assert rejected["where"] == "blank.png"
    assert "expected words to answer with" in rejected["reason"]
