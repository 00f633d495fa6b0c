"""The studies on clips: targets in space and time, and the picture of where models look."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from groundkern.maps import FIXED_POINT_ONE
from groundkern.trainer.evidence import clips, curves, presets, tables
from groundkern.trainer.evidence.plan import METHODS, Preset
from groundkern.trainer.evidence.runs import Desk

_SMALL = {"samples": 8, "held_out": 4, "batch_size": 4, "steps": 1, "every": 1, "model": "quick"}
MOVING, APPEARING = (
    replace(study, **_SMALL, seeds=1)
    for study in presets.CPU.studies
    if study.name in ("moving_patch", "appearing_patch")
)
SHAPE = (6, 3, 3)  # seconds, rows, columns of visual tokens


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return Desk(tmp_path_factory.mktemp("clips"), MOVING)


def test_regions_in_space_and_time_become_targets(desk):
    """The peak of each clip's map is the cell at the second, the cell, or the second."""
    found = {name: desk.train(METHODS[name], 0) for name in ("klal", "klal_space", "klal_time")}
    for number, record in enumerate(desk._records("train")):
        (region,) = record["regions"]
        cell = ord(record["messages"][1]["content"]) - ord("A")
        where = torch.zeros(SHAPE, dtype=torch.bool)
        where[:, cell // 3, cell % 3] = True
        when = torch.zeros(SHAPE, dtype=torch.bool)
        when[region["time"][0]] = True
        wanted = {"klal": where & when, "klal_space": where, "klal_time": when}
        for name, whole in found.items():
            peak = whole["gk_map_target"][number, 0] == FIXED_POINT_ONE
            assert torch.equal(peak.view(SHAPE), wanted[name]), name


def test_curves_on_clips_keep_a_map_of_which_the_page_has_a_picture(desk, tmp_path):
    study = replace(MOVING, methods=("plain", "klal"))
    made = {name: {0: desk.curve(name, 0)} for name in study.methods}
    first = made["plain"][0]["map"]
    assert len(first) == 54
    assert sum(first) == pytest.approx(1, abs=1e-3)
    assert made["klal"][0]["points"] != made["plain"][0]["points"]
    preset = Preset("x", (study,))
    kept = curves.expanded(curves.compact({study.name: made}))
    assert kept[study.name]["plain"][0]["map"] == first
    clips.draw_clips(tmp_path, preset, {})
    assert not (tmp_path / tables.CLIP).exists()
    clips.draw_clips(tmp_path, preset, kept)
    with Image.open(tmp_path / tables.CLIP) as picture:
        assert picture.width > 6 * 50


def test_older_curves_are_those_of_the_same_settings():
    """A method that is told all of the regions is what it was before there were clips."""
    assert "of_regions" not in MOVING.settings("klal", 0)["method"]
    assert MOVING.settings("klal_time", 0)["method"]["of_regions"] == "time"
    assert len({curves.digest(APPEARING.settings(name, 0)) for name in METHODS}) == len(METHODS)
