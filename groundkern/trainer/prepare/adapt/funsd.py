"""FUNSD: scanned forms, their words, and which answer belongs to which question.

On disk: `training_data` and `testing_data` (`--split training` or `testing`), each with
`annotations/<page>.json`, `{"form": [entities]}`, and `images/<page>.png`.

Source: guillaumejaume.github.io/FUNSD; arXiv 1905.13538.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import MAX_LINE
from groundkern.trainer.prepare.adapt import forms
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.namesakes import Images, Where
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.reading import plain_json
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed

PHRASING = forms.PHRASING
_ENDINGS = (".png", ".jpg", ".jpeg", ".tif")


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The questions of all pages of a split (default: all)."""
    data = options.data
    if not data.is_dir():
        raise ConfigError(f"{data}: expected FUNSD's folder")
    names = {"train": "training", "test": "testing"}
    split = names.get(options.split or "", options.split)
    top = data if split is None else data / f"{split}_data"
    files = sorted(top.rglob("annotations/*.json"))
    if not files:
        raise ConfigError(f"{top}: expected annotations/*.json, got none")
    root = options.images or data

    def read() -> Iterator[tuple[str, Any]]:
        images = Images(root, lambda: (_where(os.path.relpath(file, data)) for file in files))
        for file in files:
            name = os.path.relpath(file, data)
            try:
                if file.stat().st_size > MAX_LINE:
                    raise ValueError(f"more than {MAX_LINE} bytes")
                found = plain_json(file.read_bytes())
                form = found["form"]
            except (OSError, ValueError, TypeError, KeyError) as error:
                yield name, Unusable(name, f"expected JSON with a form, got {error!r}")
                continue
            yield from forms.questions(form, images.find(_where(name)), name)

    return listed(read, files), root


def _where(name: str) -> Where:
    """Where a page's image lies beside its annotation, and by its name alone."""
    folder, stem = Path(name).parent.parent, Path(name).stem
    by_name = [each + ending for each in (stem, f"images/{stem}") for ending in _ENDINGS]
    return Where(name, [f"{folder}/images/{stem}{ending}" for ending in _ENDINGS], by_name)


def convert(item: Item, options: Options) -> Made:
    """One question of a form."""
    return forms.convert_question(item, options, "funsd")
