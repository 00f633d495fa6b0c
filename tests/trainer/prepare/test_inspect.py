"""`inspect`: the page holds what training sees, and nothing in the data can break out of it."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.hf.tiny import tiny_llava_model, tiny_llava_processor
from tests.trainer.prepare.records import sample
from trainer.__main__ import main
from trainer.data.dataset import JsonLinesDataset
from trainer.inspection.cards import card
from trainer.inspection.command import oddities
from trainer.inspection.seen import SeenByModel
from trainer.inspection.views import framed

CORNER = [28, 28, 56, 56]  # the last of the 2 x 2 visual tokens of a.png


def page(path, *more: str) -> str:
    assert main(["inspect", str(path), *more]) == 0
    return path.with_suffix(".inspect.html").read_text(encoding="utf-8")


def test_the_model_s_view(write, model):
    words = [{"text": "the", "box": [2, 2, 20, 20]}, {"text": "Zqxjvkwbz", "box": [30, 2, 50, 20]}]
    regions = [
        {"text": "tired", "box": CORNER},
        {"text": "tired", "points": [[5, 5]]},
        {"text": "Alice", "polygon": [[0, 0], [20, 0], [20, 20]]},
    ]
    path = write(sample("Alice was tired", regions=regions, words=words))
    seen = SeenByModel(model)
    made = card(JsonLinesDataset(path).sample(0), seen)
    (view,) = made.views
    assert (view.width, view.height) == (8 * 56, 8 * 56)  # enlarged, to be legible
    assert view.caption == "56 x 56 pixels, seen as 56 x 56: 2 x 2 visual tokens"
    cells = [(0.0, 0.0), (224.0, 0.0), (0.0, 224.0), (224.0, 224.0)]
    assert view.grid == [(*cell, 224.0, 224.0) for cell in cells]
    assert view.inside == [view.grid[0], view.grid[3]]
    assert view.labels == [(view.grid[0], " the")]
    assert [word.box for word in view.words] == [(16.0, 16.0, 144.0, 144.0), (240, 16, 160, 144)]
    assert [shape.number for shape in view.regions] == [1, 1, 2]
    assert view.regions[1].point == (40, 40)
    kinds = [kind.strip() for _, kind, _ in made.tokens]
    assert "".join(text for text, _, _ in made.tokens) == "Alice was tired<|im_end|>"
    assert kinds[0] == "aligned"
    assert kinds[-2:] == ["aligned map", ""]
    assert "" in kinds[1:-2]  # was
    assert made.warnings == ["words of too many tokens: 1"]
    assert seen.counts["word_rows"] == 1


def test_a_processor_that_crops_shows_what_it_keeps(write, tmp_path):
    """LLaVA takes the middle of a wide image; a region left of it is on no visual token."""
    folder = tmp_path / "llava"
    tiny_llava_processor().save_pretrained(folder)
    tiny_llava_model().config.save_pretrained(folder)
    path = write(sample("yes", "wide.png", regions=[{"text": "yes", "box": [0, 0, 20, 20]}]))
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    made = card(JsonLinesDataset(path).sample(0), SeenByModel(folder))
    (view,) = made.views
    assert view.frame == pytest.approx((0.25, 0, 0.75, 1), abs=0.02)
    assert view.width == view.height
    assert len(view.grid) == len(set(view.grid)) > 8
    assert view.regions[0].box[0] < 0
    assert view.inside == []
    assert "regions on no visual token: 1" in made.warnings


def test_spans_of_the_answer_are_marked(write):
    regions = [{"char_span": [0, 9], "box": CORNER}, {"char_span": [6, 12], "box": CORNER}]
    path = write(sample("Alice was tired", regions=regions))
    made = card(JsonLinesDataset(path).sample(0), None)
    _, pieces = made.messages[1]
    assert [(text, numbers) for text, _, numbers in pieces] == [
        ("Alice ", "1"),
        ("was", "1, 2"),
        (" ti", "2"),
        ("red", ""),
    ]
    assert [shape.shift for shape in made.views[0].regions] == [0, 12]
    assert made.views[0].grid == made.tokens == []


def test_the_page_is_whole_and_safe(write, model):
    nasty = '</title><script>alert("x")</script>&amp;'
    region = {"text": nasty, "box": CORNER}
    path = write(
        sample(nasty, task=nasty, regions=[region], words=[{"text": nasty, "box": CORNER}])
    )
    html = page(path, "--model", str(model))
    assert "<script" not in html.lower()
    assert html.count("&lt;script&gt;") == 4  # task, answer, region, word
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', html)
    uri = re.search(r'href="data:image/png;base64,([^"]+)"', html)[1]
    assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (56, 56)


def test_warnings_and_bad_lines(write, capsys):
    path = write(
        sample(),
        sample("x", regions=[{"text": "x", "box": [0, 0, 56, 50]}]),
        sample("", image=None),
        b"{",
        sample(image="cut.png", words=[{"text": "x", "box": CORNER}] * 2),
    )
    whole = (path.parent / "a.png").read_bytes()
    (path.parent / "cut.png").write_bytes(whole[:-30])
    html = page(path, "--samples", "9")
    assert "4 samples, 1 bad; 4 shown" in capsys.readouterr().out
    for sentence in (
        "lines that cannot be used: 1",
        "samples without supervision: 2 (first: data.jsonl:1)",
        "samples with a region box over more than half of its image: 1 (first: data.jsonl:2)",
        "samples with an empty answer: 1 (first: data.jsonl:3)",
        "samples with the same word in the same box twice: 1 (first: data.jsonl:5)",
        "data.jsonl:4: expected a JSON object, got invalid JSON",
        "data.jsonl:5: `images[0]`: expected an image that can be decoded",
    ):
        assert sentence in html
    assert oddities(JsonLinesDataset(path).sample(0)) == ["samples without supervision"]


def test_a_chosen_seed_shows_others_and_a_missing_file_is_one_sentence(write, tmp_path, capsys):
    path = write(*(sample(f"answer {n}") for n in range(30)))
    first, other = (page(path, "--samples", "3", *seed) for seed in ((), ("--seed", "1")))
    assert [f"answer {n}" in first for n in range(4)] == [True, True, True, False]
    assert first != other
    assert len(re.findall("answer [0-9]", other)) == 3
    assert main(["inspect", str(tmp_path / "none.jsonl")]) == 2
    assert "which is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["inspect", str(path), "--what"])
    assert exit.value.code == 2


def test_a_frame_cuts_pads_and_resizes():
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, 10:] = 255
    image = Image.fromarray(pixels)
    right = framed(image, (0.5, 0.0, 1.0, 1.0), (30, 30))
    shown = Image.open(io.BytesIO(base64.b64decode(right.uri.partition(",")[2])))
    assert np.asarray(shown).min() == 255
    padded = framed(image, (0.5, -0.5, 1.0, 1.5), (10, 20))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(padded.uri.partition(",")[2]))))
    assert shown[:4].max() == shown[-4:].max() == 0
    assert shown[8:12].min() == 255
    assert padded.point(0.5, 0.0) == (0, padded.height / 4)
