"""ChartQA: questions about charts; no places (`prepare marks` finds those of the answers).

On disk: the original folder has `train`, `val` and `test`, each with `png/` and the lists
`<split>_human.json` and `<split>_augmented.json` of `{"imgname", "query", "label"}`. The Hugging
Face sets have `image`, `query` or `question`, `label` or `answer` (a text or a list) and sometimes
`human_or_machine` (0 human, 1 machine) or `type`.

Source: github.com/vis-nlp/ChartQA, README; arXiv 2203.10244.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import wrong
from groundkern.trainer.prepare.adapt.common import Options, embedded, tables
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import field_of, first_there
from groundkern.trainer.prepare.reading import json_array
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed
from groundkern.trainer.records import chat_sample

PHRASING = None
_MADE_BY = {0: "human", 1: "augmented"}


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The questions of a split (default: train), or of one of its files."""
    if (rows := tables(options)) is not None:
        return rows, None
    data = options.data
    folder = data.parent if data.is_file() else data / (options.split or "train")
    files = [data] if data.is_file() else sorted(folder.glob("*_*.json"))
    if not files:
        raise ConfigError(f"{folder}: expected <split>_human.json or <split>_augmented.json")

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            kind = file.stem.rpartition("_")[2]
            for i, record in enumerate(json_array(file)):
                bad = isinstance(record, Unusable)
                yield f"{file.name}[{i}]", record if bad else (kind, record)

    return listed(read, files), options.images or folder


def convert(item: Item, options: Options) -> Made:
    """One question and its answer; several answers are joined by commas."""
    if options.root is None:
        kind, row = item.value.get("human_or_machine", item.value.get("type")), item.value
        kind = str(_MADE_BY.get(kind, kind) if isinstance(kind, int) else kind)
        kind = kind.removesuffix("_test")
        found = embedded(row, item, options)
        image, pictures = found.path, found.files
    else:
        kind, row = item.value
        name = field_of(row, "imgname", str, item.where)
        image, pictures = first_there(options.root, [f"png/{name}", name]), {}
    question = field_of(row, "query" if "query" in row else "question", str, item.where)
    name = "label" if "label" in row else "answer"
    answer = field_of(row, name, (str, list, int, float), item.where)
    texts = [str(part).strip() for part in answer] if isinstance(answer, list) else [str(answer)]
    if not texts or not all(texts):
        raise wrong(item.where, name, "an answer", repr(answer)[:80])
    task = f"chartqa_{kind}" if kind in ("human", "augmented") else "chartqa"
    sample = chat_sample([image], question.strip(), ", ".join(texts), task=task)
    return Made([sample], pictures)
