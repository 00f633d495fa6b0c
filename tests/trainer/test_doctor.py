"""`groundkern doctor` on model folders: what it prints, the page, the exit status."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from benchmarks.families.zoo.tiles import llava_next_model, llava_next_processor
from groundkern.trainer.program import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder whose images become a global view, tiles and newline tokens."""
    path = tmp_path_factory.mktemp("model")
    llava_next_model().save_pretrained(path)
    llava_next_processor().save_pretrained(path)
    return path


def test_a_model_that_works(folder, tmp_path, capsys):
    picture = tmp_path / "<chart>.png"
    Image.new("RGB", (112, 112), "white").save(picture)
    page = tmp_path / "out" / "page.html"
    words = ["doctor", "--model", str(folder), "--image", str(picture), "--output", str(page)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "LlavaNextForConditionalGeneration in" in printed
    assert (
        "80 visual tokens with a place (16 of 28 x 28 px, 64 of 14 x 14 px), 8 without" in printed
    )
    assert len(re.findall(r"^\S.*\bok\b", printed, re.M)) == 12
    html = page.read_text(encoding="utf-8")
    assert html.count("<rect ") == 80
    assert "<title>token 0: 0, 0, 28, 28 px</title>" in html
    assert "&lt;chart&gt;.png" in html and "<chart>" not in html
    assert "This model can be trained with images" in html


def test_a_model_that_does_not_says_why(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    broken = tmp_path / "broken"
    llava_next_model(attention_dropout=0.5).save_pretrained(broken)
    processor = llava_next_processor()
    processor.vision_feature_select_strategy = "full"
    processor.save_pretrained(broken)
    assert main(["doctor", "--model", str(broken), "--output", str(page)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^Collator +no: `vision_feature_select_strategy`: expected", printed, re.M)
    assert re.search(r"^Side tokens +no: `attention_dropout`: expected 0", printed, re.M)
    assert re.search(r"^KLAL +not tried: an earlier step failed", printed, re.M)
    html = page.read_text(encoding="utf-8")
    assert "This model cannot be trained with images" in html
    assert "Not known: see the line of the collator." in html


def test_a_folder_that_is_not_there(capsys):
    assert main(["doctor", "--model", "/no/such/folder"]) == 2
    assert "expected a model folder" in capsys.readouterr().err
