"""`groundkern look`: maps of every answer token, a picture, a table, clear errors."""

from __future__ import annotations

from argparse import Namespace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from groundkern.hf import detach
from groundkern.maps import patch_grid
from groundkern.trainer import look as looking
from groundkern.trainer.config import ConfigError
from groundkern.trainer.drawing.pages import load_font
from groundkern.trainer.pictures import heated, outline
from groundkern.trainer.program import main
from groundkern.trainer.sheet import fitted
from tests.hf.families import FAMILIES

ANSWER = "The red patch is in row 2."


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Pictures that are drawn quickly."""
    monkeypatch.setattr(looking, "WHOLE", 60_000)
    monkeypatch.setattr(looking, "OF_ROW", 20_000)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (97, 150, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image):
    """A saved InternVL (tiles and a global view), and an image beside it."""
    path = tmp_path_factory.mktemp("internvl")
    built = FAMILIES["internvl"]
    built.model().save_pretrained(path / "model")
    built.processor().save_pretrained(path / "model")
    image.save(path / "image.png")
    return path


def run(folder, *more: str) -> int:
    given = ["--model", str(folder / "model"), "--image", str(folder / "image.png")]
    return main(["look", *given, "--prompt", "Where?", "--output", str(folder / "o.png"), *more])


def test_maps_are_those_of_the_collated_rows(image):
    """Every answer token gets a map; attention sums to one over the image and its newlines."""
    built = FAMILIES["llava_next"]
    model, processor = built.model(), built.processor()
    looks = looking.look(model, processor, image, "Where?", ANSWER)
    assert "".join(looks.tokens).startswith(ANSWER)
    assert looks.log_prob.shape == (len(looks.tokens),)
    assert bool((looks.log_prob < 0).all())
    for name in looking.MAPS:
        assert looks.maps[name].shape == (len(looks.tokens), 3, len(looks.rects))
    mass = looks.maps["attention"].sum(-1)
    assert bool((mass <= 1 + 1e-5).all() and (mass > 0.3).all())  # newlines have the rest
    assert bool((looks.maps["gradcam"] >= 0).all())
    both = looks.over("contribution", [0, 2], [1, 2])
    wanted = looks.maps["contribution"][[0, 2], 1:].sum(1).mean(0)
    torch.testing.assert_close(both, wanted)
    detach(model)


def test_command_writes_a_picture_and_a_table(folder, capsys):
    np.save(folder / "heat.npy", np.eye(6))
    shown = ("--answer", ANSWER, "--region", "10,10,60,50", "--layers", "0,2", "--per-layer")
    shown += ("--heat", str(folder / "heat.npy"))
    assert run(folder, *shown, "--token", "1") == 0
    printed = capsys.readouterr().out
    assert "' red'" in printed
    assert "against the region" in printed
    with Image.open(folder / "o.png") as picture:
        assert picture.format == "PNG"
        assert picture.height > 3 * 130  # the sum and two layers
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
    assert run(folder, "--answer", ANSWER) == 0
    assert "against the region" not in capsys.readouterr().out
    assert Image.open(folder / "o.png").size < (3 * 360, 300)


def test_small_images_are_enlarged_and_large_ones_are_not_lost():
    assert looking.enlarged(Image.new("RGB", (56, 28)), 700_000).size == (1183, 592)
    assert looking.enlarged(Image.new("RGB", (463, 1013)), 700_000).size == (566, 1238)
    assert looking.enlarged(Image.new("RGB", (4000, 8)), 700_000).size == (2400, 5)


def test_a_mask_and_a_heat_of_a_box_are_the_box(tmp_path):
    inside = np.zeros((97, 150), np.uint8)
    inside[10:50, 10:60] = 5
    Image.fromarray(inside).save(tmp_path / "mask.png")
    np.save(tmp_path / "heat.npy", inside)
    rects, boxes = patch_grid(7, 9), [(10 / 150, 10 / 97, 60 / 150, 50 / 97)]
    wanted = looking.Target(boxes).on(rects)
    for mask, heat, value in ((["mask.png"], [], 5), ([], ["heat.npy"], None)):
        masks, heats = ([tmp_path / name for name in names] for names in (mask, heat))
        given = Namespace(mask=masks, heat=heats, mask_value=value)
        target = looking.Target([], looking.rasters_of(given, (150, 97)))
        assert torch.equal(target.on(rects), wanted)
        assert len(target.drawn()["polylines"]) == 1
    assert looking.Target().on(rects) is None


def test_the_models_own_answer_is_explained(folder, capsys):
    assert run(folder, "--max-new-tokens", "4") == 0
    assert "Picture:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--region", "10,10,60"), "expected X0,Y0,X1,Y1"),
        (("--region", "10,10,600,50"), "a pixel box within the image"),
        (("--region", "0,0,2,1", "--coord", "unit"), "a unit box within the image"),
        (("--mask-value", "3"), "--mask-value: expected a --mask whose pixels it picks, got none"),
        (("--layers", "0-3"), "expected numbers below 3"),
        (("--layers", "last"), "expected numbers as"),
        (("--answer", "Yes", "--token", "9"), "--token"),
        (("--answer", ""), "--answer: expected a token at least, got ''"),
        (("--image", "a.png", "b.png"), "--image: expected one image, got 2"),
    ],
)
def test_bad_arguments_are_one_sentence(folder, capsys, more, message):
    assert run(folder, *more) == 2
    assert message in capsys.readouterr().err


def test_missing_images_and_models(folder, capsys):
    assert run(folder, "--image", str(folder / "none.png")) == 1
    assert "none.png" in capsys.readouterr().err
    assert run(folder, "--model", str(folder / "none")) == 2
    assert "`model.path`" in capsys.readouterr().err


def test_a_mask_of_another_image_is_one_sentence(folder, capsys):
    Image.new("L", (97, 150), 1).save(folder / "turned.png")
    assert run(folder, "--mask", str(folder / "turned.png")) == 1
    assert "`mask`: expected a mask of the ratio of its image, 150 x 97" in capsys.readouterr().err
    assert run(folder, "--heat", str(folder / "none.npy")) == 1
    assert "'none.npy', which is not there" in capsys.readouterr().err


def test_regions_and_layers_are_read():
    assert looking.parse_box("100,0,500,1000", "per_mille", (7, 7)) == (0.1, 0.0, 0.5, 1.0)
    assert looking.parse_box("2,1,4,2", "pixel", (4, 2)) == (0.5, 0.5, 1.0, 1.0)
    assert looking.parse_layers("4,0-2,1", 5) == [0, 1, 2, 4]
    assert looking.parse_layers(None, 2) == [0, 1]
    with pytest.raises(ConfigError):
        looking.parse_layers("2-1", 5)


@pytest.mark.parametrize(
    ("size", "answer"),
    [((40, 3000), "a $100 answer " * 80), ((463, 1013), "Yes"), ((3000, 40), "答" * 900)],
)
def test_no_text_is_over_another_or_a_picture(size, answer):
    """Strips, receipts and icons, whatever the model says; the pictures are drawn 1:1."""
    rects = torch.tensor([[0, 0, 0.5, 1.0], [0.5, 0, 1.0, 1.0]])
    maps = {name: torch.rand(1, 3, 2) - 0.2 for name in looking.MAPS}
    looks = looking.Looks([answer], torch.zeros(1), rects, maps)
    image, target = Image.new("RGB", size, "white"), looking.Target([(0.1, 0.1, 0.4, 0.4)])
    drawn = target.on(rects), target.drawn()
    for per_layer in (False, True):
        sheet = looking.draw(looks, image, [0], [0, 1, 2], *drawn, per_layer=per_layer)
        pictures, (width, height) = (4 if per_layer else 1), sheet.size
        assert len(sheet.texts) >= 6 * pictures + 1
        for one, other in combinations(sheet.texts, 2):
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1]
        for x0, y0, x1, y1 in sheet.texts:
            assert min(x0, y0) >= 0
            assert x1 <= sheet.image.width
            assert y0 < y1 <= sheet.image.height
        assert max(width, height) <= looking.LONGEST
        last = max(y1 for *_, y1 in sheet.texts)
        assert sheet.image.height - last - height >= 0
        colours = np.asarray(sheet.image.crop((0, last, sheet.image.width, last + height)))
        assert (colours != 255).any()  # a picture, and no text


def test_a_title_that_is_too_long_ends_in_an_ellipsis():
    font = load_font("DejaVu Sans", 20)
    assert fitted("Yes, it is.", font, 400, 3) == ["Yes, it is."]
    assert fitted("one two three", font, font.getlength("one two "), 3) == ["one two", "three"]
    lines = fitted("word " * 90, font, 300, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("word…")
    assert all(font.getlength(line) <= 300 for line in lines)
    assert fitted("W" * 30, font, font.getlength("W" * 10), 5) == ["W" * 10] * 3
    assert fitted(" ", font, 300, 3) == []


@pytest.mark.parametrize("colour", ["white", "black", (0, 150, 255), (120, 120, 120), "red"])
def test_a_region_s_outline_is_seen_on_any_ground(colour):
    image = Image.new("RGB", (100, 100), colour)
    ground = np.asarray(image)[0, 0].astype(int)
    outline(image, {"boxes": [(0.3, 0.3, 0.7, 0.7)], "points": [], "polygons": [], "polylines": []})
    line = np.asarray(image)[50, :50].astype(int)  # from outside to inside, over one edge
    assert (np.abs(line - ground).max(-1) > 100).sum() >= 2


def test_overlapping_views_add_up_and_signs_have_colours():
    """A tile's token counts in full, a global view's is spread over its own area."""
    paper = Image.new("RGB", (40, 40), "white")
    tiles = [(x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5) for y in (0, 1) for x in (0, 1)]
    views = [*tiles, (0.0, 0.0, 1.0, 1.0)]

    def pixels(values):
        return np.asarray(heated(paper, views, np.array(values), 1.0)).astype(int)

    spread, alone = pixels([0, 0, 0, 0, 1.0]), pixels([0.25, 0.25, 0.25, 0.25, 0])
    assert np.array_equal(spread, alone)
    warm, cold = pixels([1.0, 0, 0, 0, 0])[5, 5], pixels([-1.0, 0, 0, 0, 0])[5, 5]
    assert warm[0] > warm[2]
    assert cold[2] > cold[0]
