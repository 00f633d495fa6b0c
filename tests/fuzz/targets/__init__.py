"""The fuzz targets, by name; a module for each part of the program that parses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module

from tests.fuzz.target import Target

# Inputs of each target, relative to one another: cheap ones are drawn most.
SHARES = {
    **dict.fromkeys(("options", "marked_reply"), 150),
    **dict.fromkeys(("tesseract", "frame"), 120),
    **dict.fromkeys(("paddle", "phrase_reply", "sample"), 80),
    "path": 50,
    "usage": 40,
    "squad_rows": 30,
    **dict.fromkeys(("join", "json_lines", "fixations"), 18),
    **dict.fromkeys(("json_array", "metrics", "cached_answer", "tokens", "answers"), 8),
    **dict.fromkeys(("pickle", "embedded", "image", "raster", "prepare_record", "noun_phrases"), 5),
    "answers": 3,
    **dict.fromkeys(("clip", "flickr30k", "labelme", "yolo", "places", "matching"), 2),
}

MODULES = (
    "answers",
    "boxes",
    "samples",
    "settings",
    "files",
    "adapters",
    "annotations",
    "marks",
    "phrases",
    "replies",
    "spans",
    "geometry",
    "records",
    "pictures",
    "rasters",
    "predictions",
    "clips",
    "gaze",
)


@cache
def targets() -> dict[str, Target]:
    """All targets, in a fixed order."""
    found = {}
    for name in MODULES:
        for target in import_module(f"tests.fuzz.targets.{name}").TARGETS:
            found[target.name] = replace(target, share=SHARES.get(target.name, 1))
    return found
