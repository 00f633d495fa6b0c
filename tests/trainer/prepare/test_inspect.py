"""`inspect`: the page holds what training sees, and nothing in the data can break out of it."""

from __future__ import annotations

import base64
import io
import random
import re
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.families.zoo.first import tiny_llava_model, tiny_llava_processor
from groundkern.hf import GroundingCollator
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.inspection import pages as paging
from groundkern.trainer.inspection.captions import Room, overlap
from groundkern.trainer.inspection.cards import Card, card
from groundkern.trainer.inspection.recent import Recent
from groundkern.trainer.inspection.seen import SeenByModel
from groundkern.trainer.inspection.showing import Show, shown
from groundkern.trainer.inspection.summary import oddities, summarise
from groundkern.trainer.inspection.views import data_uri, drawn, framed
from groundkern.trainer.prepare.grid import visual_grid
from groundkern.trainer.program import main
from tests.trainer.prepare.records import sample

CORNER = [28, 28, 56, 56]  # the last of the 2 x 2 visual tokens of a.png


def page(path, *more: str) -> str:
    assert main(["inspect", str(path), *more]) == 0
    return path.with_suffix(".inspect.html").read_text(encoding="utf-8")


def card_of(path, model=None, index: int = 0) -> Card:
    return card(JsonLinesDataset(path).sample(index), model, Recent())


class Nesting(HTMLParser):
    """Fails on an element that is closed out of turn; keeps what the pictures hold."""

    VOID = ("meta", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: list[str] = []
        self.links: list[str] = []
        self.pictures: list[tuple[float, float]] = []
        self.outside: list[dict] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        got = dict(attributes)
        assert "style" not in self.open[-1:]
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [got["id"]] if "id" in got else []
        if tag in ("use", "a"):
            (self.uses if tag == "use" else self.links).append(got["href"])
        if tag == "svg" and "viewbox" in got:
            self.pictures.append(tuple(map(float, got["viewbox"].split()[2:])))
        if tag == "rect" and self.pictures:
            x, y, w, h = (float(got[name]) for name in ("x", "y", "width", "height"))
            width, height = self.pictures[-1]
            if min(x, y, w, h) < 0 or x + w > width + 0.2 or y + h > height + 0.2:
                self.outside.append(got)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_model_s_view(write, model):
    words = [{"text": "the", "box": [2, 2, 20, 20]}, {"text": "Zqxjvkwbz", "box": [30, 2, 50, 20]}]
    regions = [
        {"text": "tired", "box": CORNER},
        {"text": "tired", "points": [[5, 5]]},
        {"text": "Alice", "polygon": [[0, 0], [20, 0], [20, 20]]},
    ]
    path = write(sample("Alice was tired", regions=regions, words=words))
    seen = SeenByModel(model)
    made = card_of(path, seen)
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


def test_a_control_shows_what_is_trained_on(write, model, tmp_path, capsys):
    path = write(sample("Alice was tired", regions=[{"text": "tired", "box": [0, 0, 28, 28]}]))
    right = card_of(path, SeenByModel(model)).views[0]
    seen = SeenByModel(model)
    seen.make_wrong("complement", JsonLinesDataset(path), 0)
    (view,) = card_of(path, seen).views
    assert right.inside == [right.grid[0]]
    assert view.inside == right.grid[1:]
    assert view.regions[0].box == right.regions[0].box  # its outside is meant
    seen.make_wrong("random", JsonLinesDataset(path), 1)
    (view,) = card_of(path, seen).views
    assert view.regions[0].box != right.regions[0].box
    assert view.inside != right.inside
    text = page(path, "--model", str(model), "--control", "random", "--control-seed", "1")
    assert text.count("<svg") == page(path, "--model", str(model)).count("<svg")
    assert main(["inspect", str(path), "--control", "random"]) == 2
    assert "`--control`: expected a --model" in capsys.readouterr().err


def test_a_processor_that_crops_shows_what_it_keeps(write, tmp_path):
    """LLaVA takes the middle of a wide image; a region left of it is on no visual token."""
    folder = tmp_path / "llava"
    tiny_llava_processor().save_pretrained(folder)
    tiny_llava_model().config.save_pretrained(folder)
    path = write(sample("yes", "wide.png", regions=[{"text": "yes", "box": [0, 0, 20, 20]}]))
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    made = card_of(path, SeenByModel(folder))
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
    made = card_of(path)
    _, pieces = made.messages[1]
    assert [(text, numbers) for text, _, numbers in pieces] == [
        ("Alice ", "1"),
        ("was", "1, 2"),
        (" ti", "2"),
        ("red", ""),
    ]
    captions = [shape.caption for shape in made.views[0].regions]
    assert [caption.text for caption in captions] == ["1", "2"]
    assert not overlap(captions[0].rect, captions[1].rect)
    assert made.views[0].grid == made.tokens == []


def test_the_page_is_whole_and_safe(write, model):
    nasty = '</title><script>alert("x")</script>&amp;'
    region = {"text": nasty, "box": CORNER}
    path = write(
        sample(nasty, task=nasty, regions=[region], words=[{"text": nasty, "box": CORNER}])
    )
    html = page(path, "--model", str(model))
    assert "<script" not in html.lower()
    assert html.count("&lt;script&gt;") == 4 + 1  # task, answer, region, word and its caption
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|#p[0-9a-f]{16}")', html)
    found = Nesting(html)
    assert found.outside == []
    assert {use.removeprefix("#") for use in found.uses} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
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
    assert html.count("a sample without supervision") == 2
    dataset = JsonLinesDataset(path)
    odd = oddities(dataset)
    assert [why for why, which in odd.items() if which[0]] == ["without supervision"]
    counts = {"samples": 4, "images": 3, "regions": 1, "words": 2, "phrases": 0}
    more = {"samples with regions": 1, "samples with words": 1, "samples with phrases": 0}
    assert summarise(dataset, odd).counts == counts | more


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
    right = framed(image.size, (0.5, 0.0, 1.0, 1.0), (30, 30))
    shown = drawn(image, right)
    assert shown.size == (30, 30)
    assert np.asarray(shown).min() == 255
    padded = framed(image.size, (0.5, -0.5, 1.0, 1.5), (10, 20))
    shown = np.asarray(drawn(image, padded))
    assert shown[:4].max() == shown[-4:].max() == 0
    assert shown[8:12].min() == 255
    assert padded.point(0.5, 0.0) == (0, padded.height / 4)
    assert (padded.width, padded.height) == (250, 500)


def test_small_print_stays_and_a_large_scan_becomes_jpeg():
    receipt = framed((463, 1013))
    assert (receipt.width, receipt.height) == (463, 1013)
    scan = framed((3500, 2500))
    assert 2_990_000 < scan.width * scan.height <= 3_010_000
    noise = np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8)
    assert data_uri(Image.fromarray(noise)).startswith("data:image/jpeg;base64,")
    assert data_uri(Image.new("RGB", (700, 500))).startswith("data:image/png;base64,")
    assert data_uri(Image.fromarray(noise[:200, :300])).startswith("data:image/png;base64,")


@pytest.mark.parametrize("size", [(500, 500), (463, 1013), (2000, 300)])
def test_captions_never_overlap_on_a_dense_page(size):
    """300 words: what finds no room is left out and counted, and the first come first."""
    rng, (width, height) = random.Random(str(size)), size
    room, taken = Room(width, height), []
    for number in range(300):
        x, y = (number % 15) * width / 15, number // 15 * height / 20
        box = (x, y, rng.uniform(0.3, 1) * width / 15, rng.uniform(0.4, 0.9) * height / 20)
        taken.append(room.take(rng.choice(["a", "total", "収入印紙", "RM 1,203.50"]), box))
    rects = [caption.rect for caption in taken if caption]
    assert len(rects) + room.hidden == 300
    assert taken[0] is not None
    assert len(rects) > 60 and room.hidden > 10
    assert not any(overlap(*pair) for pair in combinations(rects, 2))
    for x, y, wide, high in rects:
        assert x >= 0 and y >= 0 and x + wide <= width and y + high <= height


def test_a_caption_shrinks_towards_its_box():
    """At every size it is within the room it was given, at the corner next to the box."""
    room = Room(600, 600)
    box = (100.0, 100.0, 50.0, 20.0)
    seen = set()
    while (caption := room.take("12", box)) is not None:
        x, y, width, height = caption.rect
        assert caption.anchor[0] in (x, pytest.approx(x + width, abs=0.1))
        assert caption.anchor[1] in (y, pytest.approx(y + height, abs=0.1))
        start = caption.anchor[0] + caption.start[0], caption.anchor[1] + caption.start[1]
        assert x <= start[0] and start[0] + caption.length <= x + width + 0.1
        assert y + 0.6 * height < start[1] < y + height
        seen.add((caption.right, caption.bottom))
    assert seen == {(False, True), (False, False), (True, False)}
    assert room.hidden == 1


def test_an_image_of_several_samples_is_on_the_page_once(write, monkeypatch):
    path = write(*(sample(f"answer {n}") for n in range(5)))
    decoded = []
    load = "groundkern.trainer.inspection.recent.load_rgb"
    monkeypatch.setattr(load, lambda *a, **k: decoded.append(a) or Image.new("RGB", a[1]))
    html = page(path)
    assert html.count("data:image/png;base64,") == 1
    assert len(Nesting(html).uses) == 5
    assert len(decoded) == 1


def test_a_filter_by_task_line_and_warning(write, capsys):
    good = {"regions": [{"text": "answer", "box": CORNER}]}
    tasks = ("a", "b", "c")
    path = write(
        *(sample(f"answer {n}", task=tasks[n % 3], **(good if n % 4 else {})) for n in range(12)),
        b"{",
        sample("answer 13", image="none.png"),
    )

    def numbers(*more: str) -> list[int]:
        return [int(n) for n in re.findall(r"<h3>data.jsonl:([0-9]+)", page(path, *more))]

    assert numbers("--task", "b", "c", "--samples", "3") == [2, 3, 5]
    assert numbers("--where", "data.jsonl:7", "3") == [3, 7]
    assert numbers("--where", "7", "3", "2", "--task", "b") == [2]
    assert numbers("--warnings") == [1, 5, 9]  # no supervision
    assert numbers("--warnings", "--samples", "2", "--task", "a") == [1]
    chosen = numbers("--warnings", "--samples", "2", "--seed", "3")
    assert len(chosen) == 2 and set(chosen) < {1, 5, 9}
    capsys.readouterr()
    for words, status, sentence in (
        (("--task", "d"), 2, "`--task`: expected one of ['a', 'b', 'c'], got 'd'"),
        (("--where", "other.jsonl:3"), 2, "expected lines as data.jsonl:17, got 'other.jsonl:3'"),
        (("--where", "99"), 2, "`--where`: expected a line with a sample, got '99'"),
        (("--where", "data.jsonl:13"), 1, "data.jsonl:13: expected a JSON object"),
        (("--where", "14"), 1, f"'none.png', which is not there (images from {path.parent})"),
        (("--samples", "0"), 2, "`--samples`: expected 1 or more, got 0"),
    ):
        assert main(["inspect", str(path), *words]) == status
        assert sentence in capsys.readouterr().err


def test_the_root_is_named_and_nothing_usable_is_status_1(write, tmp_path, capsys):
    path = write(sample(image="b.png"), sample(image="c.png"))
    assert main(["inspect", str(path)]) == 1
    said = capsys.readouterr()
    assert f"(images from {tmp_path})" in said.out
    assert "got 2 lines that cannot be used" in said.err
    assert f"`images[0]`: expected an image file under {tmp_path}, got 'b.png'" in said.err
    (tmp_path / "other").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "other" / "b.png")
    page(path, "--root", str(tmp_path / "other"))
    assert f"1 samples, 1 bad; 1 shown: {path.with_suffix('.inspect.html')} (images from " in (
        said := capsys.readouterr().out
    )
    assert str(tmp_path / "other") in said
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[:-30])  # a header that is right, and nothing else
    assert main(["inspect", str(path)]) == 1
    assert "got 1 of 1 that cannot" in capsys.readouterr().err


def test_large_pages_are_split_and_link_to_each_other(write, monkeypatch, capsys):
    monkeypatch.setattr(paging.Pages.__init__, "__defaults__", (9_000,))
    path = write(*(sample(f"answer {n}") for n in range(12)))
    folder, name = path.parent, "data.inspect"
    for number, text in ((3, paging.MARK), (4, paging.MARK), (5, b"somebody else's")):
        (folder / f"{name}.{number}.html").write_bytes(text)
    first = page(path)
    assert "12 shown" in (said := capsys.readouterr().out) and "and 1 more pages" in said
    second = (folder / f"{name}.2.html").read_text(encoding="utf-8")
    names = sorted(file.name for file in folder.glob("*.html"))
    assert names == [f"{name}.2.html", f"{name}.5.html", f"{name}.html"]
    found = [Nesting(html) for html in (first, second)]
    assert found[0].links == [f"{name}.2.html"] * 2
    assert found[1].links == [f"{name}.html"]
    for each in found:  # each has the picture it shows
        assert {use.removeprefix("#") for use in each.uses} <= set(each.ids)
    answers = [re.findall(r"</b>answer ([0-9]+)", html) for html in (first, second)]
    assert [int(n) for part in answers for n in part] == list(range(12))
    assert "In the whole file" in first and "In the whole file" not in second


def test_processes_show_what_one_does(write, model):
    words = [{"text": "the", "box": [2, 2, 20, 20]}]
    path = write(*(sample(f"answer {n}", words=words) for n in range(9)))
    dataset = JsonLinesDataset(path)
    show = Show(dataset, oddities(dataset), SeenByModel(model))
    one, two = (list(shown(show, range(9), 7, processes)) for processes in (1, 2))
    assert one == two
    assert len(one) == 7
    assert [piece.counts["word_rows"] for piece in two] == [1] * 7


def test_cheap_pixels_change_nothing_else(write, model, tmp_path):
    """What the page tells is training's own: only `pixel_values` differ, and not in their shape."""
    words = [{"text": "the", "box": [2, 2, 20, 20]}]
    path = write(sample("Alice was tired", "noise.png", words=words))
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    example = JsonLinesDataset(path)[0]
    grid, seen = visual_grid(model), SeenByModel(model)
    trained = GroundingCollator(grid.processor, grid.config)([example])
    shown = GroundingCollator(seen.processor, seen.config)([example])
    assert {name: x.shape for name, x in trained.items()} == {n: x.shape for n, x in shown.items()}
    differ = [name for name, x in trained.items() if not torch.equal(x, shown[name])]
    assert differ == ["pixel_values"]
