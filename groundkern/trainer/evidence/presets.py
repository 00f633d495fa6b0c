"""Which task goes with which methods, and how large: `cpu`, `next` (a part of it that is not run
yet), `gpu` (never run yet) and `quick`."""

from __future__ import annotations

from dataclasses import replace

from groundkern.trainer.config import ConfigError
from groundkern.trainer.evidence.plan import Drawings, Preset, Study

_PAGES = Drawings("word_page", own=(("cell", 28), ("vocabulary", 100)))
_WORD_PAGES = Study(
    "word_pages",
    _PAGES,
    (
        "plain",
        "dv_sft",
        "klal",
        "smam_dv_sft",
        "klal_phrase",
        "smam",
        "dv_sft_elsewhere",
        "klal_elsewhere",
    ),
    samples=3000,
    held_out=200,
    steps=1500,
)
_TRACING = Study(
    "line_tracing",
    Drawings("line_tracing"),
    (
        "plain",
        "klal_dv_sft",
        "klal",
        "dv_sft",
        "klal_elsewhere_dv_sft",
        "klal_last_dv_sft",
    ),
    samples=6000,
    steps=2500,
)
_NEXT = (  # gates, heads, and the built-in control beside this study's own
    "klal_ungated",
    "klal_gated",
    "klal_shuffled",
    "klal_elsewhere",
    "klal_heads",
    "klal_other_heads",
)
_INTERSECTION = Study(  # answers of one token: `answer` would be `last`
    "line_intersection",
    Drawings("line_intersection"),
    ("plain", "klal", "klal_elsewhere", "klal_last", *(x for x in _NEXT if x != "klal_elsewhere")),
    samples=6000,
    steps=2500,
)
_OBJECTS = Study(
    "two_objects",
    Drawings("two_objects"),
    ("plain", "hist", "klal", "smam", "klal_elsewhere"),
    samples=4000,
    steps=1000,
)
_POINT = Drawings("pointing", own=(("asked", 1), ("objects", 2), ("side", 3)))
_POINTING = Study(  # two numbers of an object: each has its row
    "pointing",
    _POINT,
    ("plain", "klal_phrase", "klal", "klal_phrase_elsewhere", "smam"),
    samples=4000,
    steps=2000,
)
_POINTING_TWO = replace(  # HIST's composition, of a model that knows its parts
    _POINTING,
    name="pointing_two",
    drawings=replace(_POINT, own=(("asked", 2), ("objects", 3), ("side", 3))),
    methods=("plain", "hist", "klal_phrase", "klal_phrase_hist", "smam"),
    steps=1000,
    every=25,
    start="pointer",
    start_at=0.8,
    first=_POINT,
)
_GRID = Study(
    "grid_patch",
    Drawings("grid_patch", own=(("side", 5),)),
    (
        "plain",
        "klal",
        "klal_phrase",
        "klal_last",
        "klal_answer",
        "klal_elsewhere",
        "klal_uniform",
        *(x for x in _NEXT if x != "klal_elsewhere"),
    ),
    samples=3000,
    steps=600,
    every=20,
)
_GRID_STARTED = replace(
    _GRID, name="grid_patch_started", methods=("plain", "klal"), start="plain", start_at=0.3
)
_TAUGHT = replace(  # DV-SFT's setting: a decoder that knows texts learns to see
    _WORD_PAGES,
    name="word_pages_text",
    methods=("plain", "dv_sft"),
    start="text",
    start_at=0.95,
)
_ASKED = replace(  # a model that can read learns where: as SMAM and KLAL find theirs
    _WORD_PAGES,
    name="asked_line",
    drawings=replace(_PAGES, task="asked_line", size=84),
    methods=("plain", "klal", "klal_phrase", "smam", "klal_elsewhere"),
    steps=600,
    every=20,
    start="reader",
    start_at=0.8,
    first=replace(_PAGES, size=84),
)
_FEW_WORDS = replace(  # of which a model begins to read by itself, sooner or later
    _WORD_PAGES,
    name="word_pages_20",
    drawings=replace(_PAGES, own=(("cell", 28), ("vocabulary", 20))),
    methods=("plain", "smam", "klal", "dv_sft", "smam_elsewhere"),
    steps=1000,
    seeds=10,  # where each is lucky or not
)
_BARS = Study(  # SMAM's charts: which bar, and what is printed beside it
    "coloured_bars",
    Drawings("coloured_bars", size=84),
    ("plain", "smam", "klal_smam", "klal_dv_sft", "klal", "dv_sft", "smam_elsewhere"),
    samples=4000,
    steps=1500,
)
_MOVING = Study(  # clips, in which a place has a time
    "moving_patch",
    Drawings("moving_patch", size=42, own=(("others", 2), ("seconds", 6), ("side", 3))),
    ("plain", "klal", "klal_elsewhere", "klal_space", "klal_time"),
    samples=2000,
    steps=1500,
    every=100,
    model="350k",
    seeds=3,
)
_APPEARING = replace(
    _MOVING,
    name="appearing_patch",
    drawings=replace(_MOVING.drawings, task="appearing_patch"),
    methods=("plain", "klal", "klal_elsewhere"),
)
_LESS_DATA = replace(_WORD_PAGES, name="word_pages_1000", samples=1000, methods=("plain", "dv_sft"))
_FINER = replace(  # the same pages at one and a half times the resolution
    _WORD_PAGES,
    name="word_pages_84",
    drawings=replace(_PAGES, size=84, own=(("cell", 42), ("vocabulary", 100))),
    methods=("plain", "dv_sft", "klal"),
)
_FOUR_LINES = replace(  # four times as much to read
    _WORD_PAGES,
    name="word_pages_112",
    drawings=replace(_PAGES, size=112),
    methods=("plain", "dv_sft"),
)
_LARGER = replace(_WORD_PAGES, name="word_pages_3m", model="3m", methods=("plain", "dv_sft"))
CPU = Preset(
    "cpu",
    (
        _WORD_PAGES,
        _TRACING,
        _GRID,
        _FEW_WORDS,
        _INTERSECTION,
        _TAUGHT,
        _ASKED,
        _POINTING,
        _POINTING_TWO,
        _BARS,
        _OBJECTS,
        _GRID_STARTED,
        _LESS_DATA,
        _FOUR_LINES,
        _FINER,
        _LARGER,
        _MOVING,
        _APPEARING,
    ),
)
GPU = Preset(  # never run: sized for four minutes of an H100 if a step takes 40 ms there
    "gpu",
    (
        replace(_WORD_PAGES, model="10m", batch_size=64, methods=("plain", "dv_sft")),
        replace(
            _TRACING,
            model="10m",
            batch_size=64,
            samples=3000,
            steps=750,
            methods=("plain", "klal_dv_sft"),
        ),
    ),
    seeds=2,
)
NEXT = Preset(  # of CPU, on two tasks that learn fast
    "next",
    tuple(replace(study, methods=("plain", "klal", *_NEXT)) for study in (_GRID, _INTERSECTION)),
    seeds=3,
    of="cpu",
)
QUICK = Preset(  # for tests: nothing is learnt
    "quick",
    (
        replace(
            _WORD_PAGES,
            methods=("plain", "dv_sft", "dv_sft_elsewhere"),
            samples=12,
            held_out=6,
            batch_size=4,
            steps=3,
            every=1,
            model="quick",
        ),
    ),
    seeds=1,
)
PRESETS = {preset.name: preset for preset in (CPU, NEXT, GPU, QUICK)}


def chosen(
    name: str, studies: list[str] | None, methods: list[str] | None, seeds: int | None
) -> Preset:
    """A preset, or a part of it.

    Raises:
        ConfigError: a study that it does not have, or a method that none of the studies has.
    """
    preset = PRESETS[name]
    known = {study.name: study for study in preset.studies}
    for value in studies or ():
        if value not in known:
            raise ConfigError(f"`studies`: expected some of {', '.join(known)}, got {value}")
    picked = [known[value] for value in studies] if studies else preset.studies
    compared = dict.fromkeys(method for study in picked for method in study.methods)
    for value in methods or ():
        if value not in compared:
            raise ConfigError(f"`methods`: expected some of {', '.join(compared)}, got {value}")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"`seeds`: expected a positive number, got {seeds}")
    if methods:
        wanted = {"plain", *methods}
        picked = [replace(s, methods=tuple(m for m in s.methods if m in wanted)) for s in picked]
    if seeds:
        picked = [replace(study, seeds=seeds) for study in picked]
    return replace(preset, studies=tuple(picked))
