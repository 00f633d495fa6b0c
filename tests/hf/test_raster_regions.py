"""Regions that are masks and heats: the rows and targets of a batch, in families of every view."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks.families.zoo.first import tiny_llava_processor, tiny_qwen_processor
from groundkern import maps
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.data.example import Raster, Region
from groundkern.hf.data.geometry import image_geometry
from groundkern.maps import dequantise, patch_grid, target_map
from tests.hf.collating import make_collator, make_config, make_example, make_region
from tests.hf.families import FAMILIES

ANSWER = "The red patch is in row 2"
BOX = (0.2, 0.25, 0.55, 1.0)  # in an image of 140 x 112
SUPERVISION = ("gk_side_position", "gk_side_set", "gk_side_inside", "gk_map_position",
               "gk_map_target", "gk_lens_position", "gk_lens_label", "gk_lens_inside")  # fmt: skip


def box_mask(box=BOX, height=112, width=140) -> Raster:
    x0, y0, x1, y1 = (round(v * side) for v, side in zip(box, (width, height) * 2, strict=True))
    values = torch.zeros(height, width, dtype=torch.bool)
    values[y0:y1, x0:x1] = True
    return Raster(values)


def region(phrase: str, raster: Raster) -> Region:
    return make_region(ANSWER, phrase, boxes=(), rasters=(raster,))


@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("kind", ["neighbours", "overlap"])
def test_the_mask_of_a_box_supervises_as_the_box_does(family, kind):
    words = ("red patch", "patch is", "row")
    mask = [region(word, box_mask()) for word in words]
    box = [make_region(ANSWER, word, boxes=(BOX,)) for word in words]
    collator = make_collator(family, map_kind=kind, map_rows="answer_predictor", lens=True)
    found, wanted = (collator([make_example(ANSWER, regions)]) for regions in (mask, box))
    assert int(wanted["gk_side_inside"].sum()) > 0
    for name in SUPERVISION:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2)  # of 2**20
    assert collator.counts["regions_outside"] == 0


def test_a_heat_is_the_target_and_its_hot_half_the_side_set():
    values = torch.zeros(4, 5)
    values[1, 2], values[3, 4], values[0, 0] = 8.0, 4.0, 1.0
    batch = make_collator()([make_example(ANSWER, [region("row", Raster(values))])])
    (target,) = dequantise(batch["gk_map_target"][0])
    torch.testing.assert_close(target, values.reshape(-1) / 13, rtol=0, atol=1e-6)
    columns = batch["gk_map_columns"][0].long()
    inside = batch["gk_side_inside"][0, 0, columns]
    assert inside.nonzero()[:, 0].tolist() == [7, 19]


def test_rows_of_an_answer_share_the_work_of_one_target(monkeypatch):
    calls = []

    def counted(*args, **more):
        calls.append(args)
        return target_map(*args, **more)

    monkeypatch.setattr(maps, "target_map", counted)
    regions = [region("row", box_mask()), region("red", box_mask((0, 0, 0.2, 0.25)))]
    batch = make_collator(map_rows="answer")([make_example(ANSWER, regions)])
    assert int((batch["gk_map_position"] >= 0).sum()) > 5
    assert len(calls) == 1
    grid = patch_grid(4, 5)
    wanted = target_map(grid, rasters=[box_mask(), box_mask((0, 0, 0.2, 0.25))])
    for target in dequantise(batch["gk_map_target"][0]):
        torch.testing.assert_close(target, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "idefics3"])
def test_masks_in_tiles_and_global_views(family):
    if family not in FAMILIES:
        pytest.skip("a family of a later transformers")
    built = FAMILIES[family]
    processor, config = built.processor(), built.model().config
    image = Image.new("RGB", (140, 112))
    batch = processor(text=[processor.image_token], images=[[image]], return_tensors="pt")
    (table,) = image_geometry(processor, config, [[image]], batch)
    rects = table[:, 1:]
    inside = maps.inside(rects, rasters=[box_mask()])
    assert torch.equal(inside, maps.inside(rects, boxes=[BOX]))
    for kind in ("neighbours", "uniform", "overlap", "gaussian"):
        found = target_map(rects, kind=kind, rasters=[box_mask()])
        wanted = target_map(rects, kind=kind, boxes=[BOX])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_a_mask_that_a_centre_crop_cuts_away_is_outside():
    processor, config = tiny_llava_processor(), make_config("llava")
    collator = GroundingCollator(processor, config)
    image = Image.new("RGB", (300, 56))  # the crop keeps the middle
    mask = box_mask((0, 0, 0.1, 1), 56, 300)
    batch = collator([make_example(ANSWER, [region("row", mask)], images=(image,))])
    assert collator.counts["regions_outside"] == 1
    assert collator.counts["map_rows_without_target"] == 1
    assert not (batch["gk_side_position"] >= 0).any()
    whole = GroundingCollator(tiny_qwen_processor(), make_config("qwen"))
    whole([make_example(ANSWER, [region("row", mask)], images=(image,))])
    assert whole.counts["side_rows"] > 0


def test_a_region_of_what_is_no_raster_is_named():
    bad = [Region(1, 0, 3, 0, rasters=(torch.ones(2, 2),))]
    with pytest.raises(ValueError, match=r"regions\[0\].rasters`: expected each a `Raster`"):
        make_collator()([make_example(ANSWER, bad)])
