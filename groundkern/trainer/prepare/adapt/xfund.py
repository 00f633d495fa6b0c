"""XFUND: forms in seven languages, with the words and links of FUNSD.

On disk: `<language>.<split>.json`, `{"documents": [{"img": {"fname", "width", "height"},
"document": [entities]}]}`, or a folder of such files (`--split train` or `val`, or a whole name
such as `zh.train`), and their images.

Source: github.com/doc-analysis/XFUND, release 1.0; arXiv 2104.08836.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.adapt import forms
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import first_there
from groundkern.trainer.prepare.reading import json_array
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed

PHRASING = forms.PHRASING


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The questions of all pages of a file, or of a folder's files."""
    data, split = options.data, options.split
    files = [data] if data.is_file() else sorted(data.glob("*.json"))
    if split is not None and data.is_dir():
        files = [file for file in files if split in (file.stem, file.stem.rpartition(".")[2])]
    if not files:
        wanted = "*.json" if split is None else f"*.{split}.json"
        raise ConfigError(f"{data}: expected {wanted} of XFUND, got none")
    root = options.images or (data if data.is_dir() else data.parent)

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            for i, page in enumerate(json_array(file, "documents")):
                where = f"{file.name}: documents[{i}]"
                if isinstance(page, Unusable):
                    yield where, page
                    continue
                image = page.get("img") if isinstance(page, dict) else None
                name = image.get("fname") if isinstance(image, dict) else None
                if not isinstance(name, str):
                    yield where, Unusable(page, "`img.fname`: expected a text, got none")
                    continue
                places = [name, f"images/{name}", f"{file.stem.replace('.', '_')}/{name}"]
                places += [f"{file.stem}/{name}"]
                image = first_there(root, places)
                yield from forms.questions(page.get("document"), image, where)

    return listed(read, files), root


def convert(item: Item, options: Options) -> Made:
    """One question of a form."""
    return forms.convert_question(item, options, "xfund")
