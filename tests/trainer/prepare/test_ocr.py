"""OCR around the engines: turned pages, one reading an image, pages not worth keeping, words of a
line by its ink; and each engine that is installed on one drawn page."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from benchmarks.preparing.pages import Score, TrueWord
from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.ocr import engines
from groundkern.trainer.prepare.ocr.cache import Readings
from groundkern.trainer.prepare.ocr.quality import complaint
from groundkern.trainer.prepare.ocr.reading import read_words
from groundkern.trainer.prepare.ocr.rotation import common_turn, read_upright, turned
from groundkern.trainer.prepare.ocr.scripts import joined_text
from groundkern.trainer.prepare.ocr.settings import OcrSettings, OcrWord
from groundkern.trainer.program import main
from tests.trainer.prepare.records import lines_of, sample

LINES = ("Invoice 2041 of March", "Total amount due 93.50", "Thank you for coming")
WORDS = [word for line in LINES for word in line.split()]


def page() -> Image.Image:
    """Three printed lines."""
    image = Image.new("RGB", (420, 200), "white")
    font = ImageFont.load_default(28)
    for n, line in enumerate(LINES):
        ImageDraw.Draw(image).text((20, 20 + 55 * n), line, "black", font)
    return image


def word(text: str, confidence: float = 0.9, box=(0, 0, 10, 10), turn: int = 0) -> OcrWord:
    return OcrWord(text, box, confidence, 0, turn)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_boxes_come_back_from_a_turned_image(turn):
    """A black box stays on its black pixels."""
    pixels = np.full((40, 60), 255, np.uint8)
    pixels[5:15, 20:50] = 0
    image = Image.fromarray(pixels).rotate(-turn, expand=True)  # Pillow: counterclockwise
    rows, columns = np.nonzero(np.asarray(image) == 0)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert turned(box, (60, 40), turn) == (20, 5, 50, 15)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("lies", [0, 90, 180, 270])
def test_a_turned_page_is_read_upright(lies, tells):
    """A page of one black corner; the engine reads well only with it at the left top."""
    upright = Image.new("L", (60, 40), 255)
    upright.paste(0, (0, 0, 30, 10))
    stored, seen = upright.rotate(-lies, expand=True), []

    def read(image):
        seen.append(image.size)
        rows, columns = np.nonzero(np.asarray(image) == 0)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        good = box == (0, 0, 30, 10)
        if good or tells:
            return [word("Invoice of March", 0.9, box, 0 if good else -lies % 360)]
        return [word("~ IlI ~ |l", 0.3, box)]

    (found,) = read_upright(stored, read, tells=tells)
    assert found.text == "Invoice of March"
    assert found.turn == -lies % 360
    rows, columns = np.nonzero(np.asarray(stored) == 0)
    assert found.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert len(seen) == (1 if not lies else 2 if tells else 4)


def test_most_letters_say_how_a_page_lies():
    assert common_turn([word("side", turn=90), word("of a page")]) == 0
    assert common_turn([word("watermark", turn=90), word("two")]) == 90
    assert common_turn([word(each, turn=270) for each in "\u5929\u5730\u7384"]) == 0
    assert common_turn([]) == 0


def test_a_page_whose_words_fall_away_has_a_complaint():
    bad = [word("x"), word("--"), word("word", 0.2), word("y"), word("|", 0.1)]
    options = {"min_confidence": 0.5, "min_kept": 0.4}
    said = complaint([*bad, word("good")], **options)
    assert said == "5 of 6 words fall away: 2 unsure, 1 without letters, 2 lone letters"
    assert complaint([*bad, *[word("good")] * 4], **options) is None
    assert complaint(bad[:4], **options) is None  # too few to judge
    assert complaint([word(each) for each in "12345"], **options) is None
    assert complaint([word(each) for each in "\u5929\u5730\u7384\u9ec4\u5b87"], **options) is None
    assert complaint(bad, min_confidence=0.5, min_kept=0.0) is None


def test_text_of_words_has_spaces_where_its_script_has():
    assert joined_text(["Pay", "now", "\u5929", "\u5730", "3", "%"]) == "Pay now\u5929\u57303 %"
    assert joined_text(["\uc774\ub984", "\uc8fc\uc18c"]) == "\uc774\ub984 \uc8fc\uc18c"  # Hangul


def test_a_bad_page_is_rejected_and_a_shared_image_read_once(write, monkeypatch, capsys):
    read = []

    def engine(image):
        read.append(image)
        noise = image.getpixel((0, 0)) == (0, 0, 0)
        return [word(text, 0.1 if noise else 0.9, (n, 0, n + 1, 9)) for n, text in enumerate(WORDS)]

    monkeypatch.setattr(engines, "engine", lambda settings: engine)
    monkeypatch.setattr(engines, "version", lambda settings: "fake 1")
    path = write(sample("1"), sample("2"), sample("3", image="b.png"))
    Image.new("RGB", (56, 56)).save(path.parent / "b.png")
    output = path.parent / "out.jsonl"
    words = ["prepare", "words", str(path), "--output", str(output), "--workers", "1"]
    assert main([*words, "--no-rotation"]) == 0
    assert len(read) == 2
    told = capsys.readouterr().out
    assert "1 images read\n1 images of samples that share a reading made before\n" in told
    assert [made["words"] for made in lines_of(output)] == [lines_of(output)[0]["words"]] * 2
    (rejected,) = lines_of(path.parent / "out.jsonl.rejected.jsonl")
    assert rejected["reason"] == (
        "`images[0]`: expected a page of words, got 12 of 12 words fall away: 12 unsure"
    )
    assert main([*words, "--no-rotation", "--min-kept", "0", "--overwrite"]) == 0
    assert len(read) == 2  # another rule of what is kept, the same readings
    assert len(lines_of(output)) == 3


@pytest.mark.parametrize(("name", "erased"), [("tesseract", True), ("rapid", False)])
def test_marks_read_a_chart_once_for_all_its_samples(write, monkeypatch, capsys, name, erased):
    """Tesseract's copy has no frame; a second run of other rules reads nothing."""
    read = []

    def engine(image):
        read.append(image)
        return [word("Spain", 0.9, (0, 0, 30, 10)), word("12", 0.4, (40, 0, 52, 10))]

    monkeypatch.setattr(engines, "engine", lambda settings: engine)
    monkeypatch.setattr(engines, "version", lambda settings: "fake 1")
    path = write(sample("Spain."), sample("It is 12."), sample("It is 31."))
    chart = Image.new("RGB", (200, 100), "white")
    ImageDraw.Draw(chart).rectangle((5, 5, 190, 90), outline="black")
    chart.save(path.parent / "a.png")
    output = path.parent / "out.jsonl"
    marks = ["prepare", "marks", str(path), "--output", str(output), "--workers", "1"]
    marks += ["--engine", name, "--no-rotation", "--scale", "1"]
    assert main(marks) == 0
    (seen,) = read
    assert (seen.getpixel((5, 50)) == (255, 255, 255)) == erased
    told = " ".join(capsys.readouterr().out.split())
    assert "1 images read 2 images whose reading was made before" in told
    boxes = [[region["box"] for region in made["regions"]] for made in lines_of(output)]
    assert boxes == [[[0, 0, 30, 10]], [[40, 0, 52, 10]], []]
    assert main([*marks, "--min-confidence", "0.5", "--overwrite"]) == 0
    assert [len(made["regions"]) for made in lines_of(output)] == [1, 0, 0]
    assert len(read) == 1
    assert main([*marks, "--keep-lines", "--overwrite"]) == 0
    assert len(read) == 1 + erased  # tesseract's reading was of another picture


def readings(folder: Path, language: str = "eng") -> Readings:
    return Readings(folder / "out.readings", OcrSettings(language=language), "fake 1")


def test_readings_belong_to_bytes_and_settings(tmp_path):
    image, copy = tmp_path / "a.png", tmp_path / "b.png"
    image.write_bytes(b"one")
    copy.write_bytes(b"one")
    first, second = [word("a\ud800\u5929", turn=90)], [word("other")]
    assert readings(tmp_path).words(image, lambda: first) == (first, False)
    assert readings(tmp_path).words(copy, lambda: second) == (first, True)
    assert readings(tmp_path, "deu").words(image, lambda: second) == (second, False)
    copy.write_bytes(b"two")
    with pytest.raises(ZeroDivisionError):
        readings(tmp_path).words(copy, lambda: 1 / 0)
    assert readings(tmp_path).words(copy, lambda: second) == (second, False)
    (tmp_path / "out.readings").write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match=r"out\.readings: file is not a database"):
        readings(tmp_path).words(copy, lambda: second)


def _read_slowly(folder: Path, number: int, out) -> None:
    def read():
        import time

        time.sleep(0.2)
        return [word(f"by{number}")]

    out.put(readings(folder).words(folder / "a.png", read))


def test_two_processes_read_an_image_once(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    processes = [
        context.Process(target=_read_slowly, args=(tmp_path, number, out)) for number in range(2)
    ]
    for process in processes:
        process.start()
    found = [out.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(before for _, before in found) == [False, True]
    assert found[0][0] == found[1][0]


def test_words_of_a_line_by_the_ink_between_letters():
    """The text says nothing of a space; a wide gap parts words, boxes are tight around ink."""
    characters = pytest.importorskip(
        "groundkern.trainer.prepare.ocr.characters", reason="needs opencv"
    )
    pixels = np.full((20, 120, 3), 255, np.uint8)
    for left in (5, 17, 29, 70, 82):  # five letters of 8 x 10 pixels
        pixels[5:15, left : left + 8] = 0
    quad = np.array([(100, 50), (220, 50), (220, 70), (100, 70)])
    letters, centres = list(enumerate("abcde")), [9, 21, 33, 74, 86]

    def found(crop, letters=letters, centres=centres):
        parts = characters.line_words(crop, letters, centres)
        return [("".join(char for _, char in part), tuple(np.round(box))) for part, box in parts]

    straight = characters.Crop(quad, pixels, False, 1.5)
    assert found(straight) == [("abc", (104, 54, 138, 66)), ("de", (169, 54, 191, 66))]
    spaced = [(0, "a"), (2, "b"), (3, "c"), (4, "d"), (5, "e")]
    assert [text for text, _ in found(straight, spaced)] == ["a", "bc", "de"]
    chinese = list(enumerate("\u5929\u5730cde"))
    assert [text for text, _ in found(straight, chinese)] == ["\u5929", "\u5730", "c", "de"]
    turned_line = characters.Crop(quad, pixels[::-1, ::-1], True, 1.5)
    assert turned_line.turn == 180
    assert found(turned_line)[0] == ("abc", (182, 54, 216, 66))
    tall = np.array([(50, 100), (70, 100), (70, 220), (50, 220)])
    upended = characters.Crop(tall, pixels, False, 1.5)
    assert upended.turn == 270
    assert found(upended)[0] == ("abc", (54, 104, 66, 138))

    # Thousands: the third gap is 0.8 letter heights wide, which parts letters and no digits.
    near = characters.Crop(quad, np.delete(pixels, slice(40, 65), 1), False, 1.5)
    for text, wanted in (("12345", ["12345"]), ("abcde", ["abc", "de"]), ("123de", ["123", "de"])):
        parts = found(near, list(enumerate(text)), [9, 21, 33, 49, 61])
        assert [text for text, _ in parts] == wanted
    assert [text for text, _ in found(straight, list(enumerate("12345")))] == ["123", "45"]


@pytest.mark.parametrize("engine", ["rapid", "tesseract"])
@pytest.mark.parametrize("turn", [0, 90])
def test_an_engine_reads_a_drawn_page(engine, turn):
    """All words, in order, and each box around its word's ink alone."""
    if engine == "tesseract" and shutil.which("tesseract") is None:
        pytest.skip("the program tesseract is not installed")
    if engine == "rapid":
        pytest.importorskip("rapidocr", reason="rapidocr is not installed")
    image = page().rotate(-turn, expand=True)
    found = read_words(image, OcrSettings(engine))
    assert [each.text for each in found] == WORDS
    if engine == "rapid":  # tesseract finds a short column of words without being turned
        assert {each.turn for each in found} == {-turn % 360}
    assert [each.line for each in found] == [
        n for n, line in enumerate(LINES) for _ in line.split()
    ]
    ink = np.asarray(image.convert("L")) < 128
    covered = np.zeros_like(ink)
    for each in found:
        x0, y0, x1, y1 = (round(edge) for edge in each.box)
        assert not covered[y0:y1, x0:x1].any()
        covered[y0:y1, x0:x1] = True
    assert ink[covered].sum() >= 0.97 * ink.sum()
    assert json.loads(json.dumps(found)) == [[text, list(box), *rest] for text, box, *rest in found]


def test_words_that_annotators_cut_at_punctuation_are_told():
    """Right, cut at a hyphen, and joined although a space is printed."""
    score = Score()
    true = [("Fax", 0, 30), ("466-", 40, 70), ("5087", 70, 100), ("IS", 110, 120), ("ON", 125, 140)]
    read = [("Fax", 0, 30), ("466-5087", 40, 100), ("ISON", 110, 140)]
    score.add(
        *([TrueWord(text, (x0, 0, x1, 10)) for text, x0, x1 in each] for each in (true, read))
    )
    assert (score.whole.true, score.whole.read, score.whole.right) == (5, 3, 1)
    assert (score.runs.true, score.runs.read, score.runs.right) == (5, 4, 3)
    assert score.parts == 2
    assert "2 of 5 words are parts of a word that was read whole" in score.lines()


def test_a_model_that_is_not_there_is_refused_by_name():
    pytest.importorskip("rapidocr", reason="rapidocr is not installed")
    with pytest.raises(ConfigError, match=r"nothing is downloaded: korean_PP-OCRv5\w*\.onnx"):
        engines.engine(OcrSettings("rapid", "korean"))
    with pytest.raises(ConfigError, match="does not read the language 'klingon'"):
        engines.engine(OcrSettings("rapid", "klingon"))


def test_small_images_are_enlarged_and_large_ones_reduced():
    for engine, scales in (("rapid", [2, 1.5, 1, 0.5]), ("tesseract", [3, 2.4, 2400 / 1800, 1])):
        sizes = [(400, 500), (1000, 800), (1800, 900), (3000, 4000)]
        assert [engines.best_scale(OcrSettings(engine), size) for size in sizes] == scales
    assert engines.best_scale(OcrSettings("rapid", scale=3.0), (1000, 2000)) == 2


def test_auto_is_rapidocr_where_it_is_installed(monkeypatch):
    from groundkern.trainer.prepare.ocr import rapid

    monkeypatch.setattr(rapid, "installed", lambda: True)
    assert engines.chosen(OcrSettings()) == "rapid"
    monkeypatch.setattr(rapid, "installed", lambda: False)
    assert engines.chosen(OcrSettings()) == "tesseract"
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="no engine that reads words is installed"):
        engines.engine(OcrSettings(language="none at all"))
    with pytest.raises(ConfigError, match="RapidOCR is not installed"):
        rapid.reader(OcrSettings("rapid"))
