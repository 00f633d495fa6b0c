"""Where curves are kept: a file each while a study runs, and all in evidence.json beside a page.

The page's file is in the repository. So a study that stopped on one machine goes on at another one
from the curves that were committed, and a page is made again without training anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groundkern.trainer import durable
from groundkern.trainer.evidence.plan import Preset
from groundkern.trainer.run_folder import claimed

JSON = "evidence.json"
_POINT = ("step", "accuracy", "loss")
Curves = dict[str, dict[int, dict[str, Any]]]
"""{method: {seed: a stored curve}} of one study."""


def path_of(output: Path, study: str, method: str, seed: int) -> Path:
    """The file of a curve."""
    return output / "curves" / study / method / f"{seed}.json"


def stored(output: Path, preset: Preset) -> dict[str, Curves]:
    """The curves of a preset that are done, by study, method and seed."""
    found: dict[str, Curves] = {}
    for study, method, seed in preset.runs():
        path = path_of(output, study.name, method, seed)
        if path.exists():
            curve = durable.read_json(path)
            if curve["steps"] >= study.steps:
                found.setdefault(study.name, {}).setdefault(method, {})[seed] = curve
    return found


def compact(curves: dict[str, Curves]) -> dict[str, Any]:
    """The curves as evidence.json has them: points as lists, settings as their digest."""
    return _each(curves, str, _short)


def expanded(kept: dict[str, Any]) -> dict[str, Curves]:
    """The curves of an evidence.json, of which the settings are the digest."""
    return _each(kept, int, _long)


def beside(page: Path) -> Path:
    """The evidence.json of a page."""
    return page.parent / "figures" / JSON


def take(page: Path, output: Path, preset: Preset) -> int:
    """Write the page's curves into the output's files, those of the same settings that it lacks.

    The output's evidence.json learns what the page's knows besides: of whose drawings always the
    same answer gets how many right.

    Args:
        page: its evidence.json is read if there is one.
        output: the study's folder.
        preset: which curves.

    Returns:
        How many were written.
    """
    known, own = beside(page), output / JSON
    if not known.is_file():
        return 0
    theirs = durable.read_json(known)
    mine = durable.read_json(own) if own.exists() else theirs
    guesses = {name: x for name, x in mine["guess"].items() if x is not None}
    durable.write_json(own, {**mine, "guess": {**theirs["guess"], **guesses}})
    found, taken = expanded(theirs["curves"]), 0
    for study, method, seed in preset.runs():
        curve = found.get(study.name, {}).get(method, {}).get(seed)
        path, settings = path_of(output, study.name, method, seed), study.settings(method, seed)
        fits = curve is not None and curve.get("settings") == digest(settings)
        if not fits or curve["steps"] < study.steps:
            continue
        with claimed(path) as free:
            if free and not path.exists():
                durable.write_json(path, {**curve, "settings": settings})
                taken += 1
    return taken


def digest(settings: dict[str, Any]) -> str:
    """16 hexadecimal digits that differ where settings do."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _each(curves: dict[str, Any], seed_as: Callable, curve_as: Callable) -> dict[str, Any]:
    return {
        study: {
            method: {seed_as(seed): curve_as(curve) for seed, curve in seeds.items()}
            for method, seeds in methods.items()
        }
        for study, methods in curves.items()
    }


def _short(curve: dict[str, Any]) -> dict[str, Any]:
    points = [[p["step"], round(p["accuracy"], 5), round(p["loss"], 5)] for p in curve["points"]]
    found = {
        "settings": digest(curve["settings"]),
        "steps": curve["steps"],
        "points": points,
        "at_end": {name: round(value, 5) for name, value in curve["at_end"].items()},
        "seconds": curve["seconds"],
    }
    return found | {"map": curve["map"]} if "map" in curve else found


def _long(curve: dict[str, Any]) -> dict[str, Any]:
    return {**curve, "points": [dict(zip(_POINT, p, strict=True)) for p in curve["points"]]}
