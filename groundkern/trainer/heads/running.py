"""One ranking from its options to its file and page."""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from groundkern.hf.model.layers import text_attention
from groundkern.hf.model.support import base_model
from groundkern.trainer import durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.evaluation import work
from groundkern.trainer.evaluation.grounding import Grounding
from groundkern.trainer.evaluation.models import Named, named
from groundkern.trainer.evaluation.opening import open_data
from groundkern.trainer.evaluation.report import number, span
from groundkern.trainer.heads.measuring import HeadMeasure
from groundkern.trainer.heads.page import write_page
from groundkern.trainer.heads.ranking import Ranking, ranked
from groundkern.trainer.heads_file import header
from groundkern.trainer.progress import progress
from groundkern.trainer.ranks import Ranks


def rank_heads(arguments: Namespace) -> Path:
    """Measures the heads of a model, and writes the best to `arguments.output`.

    Args:
        arguments: of `command.add_arguments`.

    Returns:
        The path of the page.

    Raises:
        ConfigError: options that do not fit, or the model.
        SampleError: no sample with a region that can be measured, or a bad one if these stop it.
        StorageError: a file could not be written.
    """
    disable_progress_bar()
    output = arguments.output
    if output.suffix != ".json":
        raise ConfigError(f"--output: expected a file that ends in .json, got {output}")
    model = named(arguments.model, arguments.adapter)
    dataset = open_data(arguments, model.processor, folder=output.with_suffix(""))
    indices = _drawn(dataset, arguments)
    grounding = _grounding(arguments, model)
    grounding.examine(dataset[index] for index in indices)
    rows = _measured(arguments, dataset, indices, grounding)
    samples = [row["figures"] for row in rows if "figures" in row]
    errors = [row["error"] for row in rows if "error" in row]
    if not samples:
        raise SampleError(f"{arguments.data}: no sample could be measured, the first: {errors[0]}")
    layers = tuple(text_attention(base_model(grounding.model)))
    ranking = ranked(samples, layers, arguments.score, arguments.top)
    told = _told(arguments, ranking, len(samples), errors)
    for sentence in told:
        print(sentence)
    durable.write_json(output, _record(arguments, model, dataset, ranking, len(samples)))
    page = output.with_suffix(".html")
    write_page(page, arguments, ranking, told, grounding, dataset, indices)
    return page


def _drawn(dataset: JsonLinesDataset, arguments: Namespace) -> list[int]:
    """Indices of samples with regions, at most `--samples`, in order."""
    found = [index for index, count in enumerate(dataset.counts["regions"]) if count]
    if not found:
        raise SampleError(
            f"{arguments.data}: expected samples with regions, by which heads are ranked, got none "
            f"among {len(dataset):,} (docs/data/data-format.md)"
        )
    if len(found) > arguments.samples:
        found = sorted(random.Random(arguments.seed).sample(found, arguments.samples))
    return found


def _grounding(arguments: Namespace, model: Named) -> Grounding:
    """The model, attached, on its device."""
    device = Ranks().device(arguments.device)
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    loaded, processor = model.load(dtype=dtype, attn_implementation=arguments.attn_implementation)
    allowed = tuple(arguments.allowed_tokens)
    return Grounding(loaded.to(device), processor, allowed=allowed, map_rows=arguments.rows)


def _measured(
    arguments: Namespace, dataset: JsonLinesDataset, indices: list[int], grounding: Grounding
) -> list[dict[str, Any]]:
    """The rows of the samples: their figures, or what is wrong with them."""
    entropy = arguments.score == "entropy"
    size = 1 if entropy else arguments.batch_size
    measure = HeadMeasure(grounding, entropy=entropy)
    samples = work.Samples(dataset, arguments.on_bad_sample)
    ahead = grounding.model.device.type != "cpu"
    rows: list[dict[str, Any]] = []
    with progress("looking", total=len(indices), unit="sample") as bar:
        for batch in work.figures(samples, indices, size, measure, ahead=ahead):
            rows += batch
            bar.update(len(batch))
    return rows


def _told(arguments: Namespace, ranking: Ranking, samples: int, errors: list[str]) -> list[str]:
    """What is said of a ranking: how it was made, then the best heads."""
    layers, heads = ranking.scores.shape
    told = [f"{layers} x {heads} heads on {samples:,} samples, by {arguments.score}."]
    if arguments.score in ("share", "hits"):
        told.append(f"A head that looks at all of the image alike has {number(ranking.chance)}.")
    if ranking.elbow is not None:
        told.append(f"Heads with less than {number(ranking.elbow)} on the image were left out.")
    if errors:
        told.append(f"{len(errors):,} samples could not be used, the first: {errors[0]}")
    for (layer, head), found in zip(ranking.chosen, ranking.intervals, strict=True):
        inside = span(found.low, found.high)
        told.append(f"layer {layer:>3} head {head:>3}  {number(found.value)}  ({inside})")
    return told


def _record(
    arguments: Namespace, model: Named, dataset: JsonLinesDataset, ranking: Ranking, samples: int
) -> dict[str, Any]:
    """The file: `groundkern.trainer.heads_file` reads its pairs."""
    return {
        **header(),
        "heads": ranking.chosen,
        "scores": [found.value for found in ranking.intervals],
        "intervals": [[found.low, found.high] for found in ranking.intervals],
        "layers": ranking.layers,
        "figures": {name: values.tolist() for name, values in ranking.figures.items()},
        "chance": ranking.chance,
        "elbow": ranking.elbow,
        "settings": {
            "score": arguments.score,
            "top": arguments.top,
            "samples": samples,
            "seed": arguments.seed,
            "rows": arguments.rows,
        },
        "model": {"path": arguments.model, "adapter": arguments.adapter, **model.identity()},
        "data": {"path": str(arguments.data), "sha256": dataset.digest},
        "versions": folder.versions(),
    }
