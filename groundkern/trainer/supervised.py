"""Whether there is anything to learn: of the answers, and for each objective that is on.

A loss without rows is 0, and a run of zeros looks like a good one. So the training file is asked at
the start, from the counts of its index and by a look at a few samples as the model will see them,
and the batches are asked while the run goes on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import TrainerCallback

from groundkern.hf import GroundedExample
from groundkern.trainer.collating import RobustCollator
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.index import COUNTS, counts_of
from groundkern.trainer.data.mixture import Mixture
from groundkern.trainer.streaming.stream import SampleStream
from groundkern.trainer.wording import cut

logger = logging.getLogger(__name__)

NEEDS = {
    "smam": ("regions", "side_rows"),
    "klal": ("regions", "map_rows"),
    "margins": ("regions", "map_rows"),
    "logit_lens": ("regions", "lens_rows"),
    "patch_text": ("regions", "contrast_rows"),
    "basic": ("images", "visual_tokens"),
    "dv_sft": ("words", "word_rows"),
    "hist": ("phrases", "phrase_rows"),
}
"""What a sample must carry for an objective, and the collator's count of what comes of it.

Distillation is of answers, which every run needs.
"""

WAYS = {
    "regions": "boxes in answers become regions by `data.boxes` or `data.coord`, and "
    "docs/data/bring-your-data.md has other ways",
    "words": "`groundkern prepare words` reads them in the images",
    "phrases": "`groundkern prepare phrases` finds them in the answers",
    "images": "it is of images alone",
}
"""Where they come from, for a file that has none."""

_OF_REGIONS = ("regions_", "side_rows_", "map_rows_", "lens_dropped_", "contrast_words_alone")
_OF_REGIONS += ("contrast_dropped_",)  # counts of what regions lose
LOOKS = 32  # samples that are collated at the start
SECONDS = 10.0  # that this may take
PATIENCE = 10_000  # samples without one trained token after which a run stops
Samples = JsonLinesDataset | Mixture | SampleStream


class _First:
    """The first samples of a stream, which the rest may be unlike."""

    def __init__(self, stream: SampleStream, looks: int) -> None:
        self.name, self._stream, self._samples = stream.name, stream, stream.first(looks)
        found = np.array([counts_of(sample) for sample in self._samples]).reshape(-1, len(COUNTS))
        self.counts = dict(zip(COUNTS, found.T, strict=True))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> GroundedExample | None:
        return self._stream.load(self._samples[index])


def check_supervision(
    config: Config, dataset: Samples, collator: RobustCollator, *, looks: int = LOOKS
) -> None:
    """Refuse a run that has nothing to learn, warn of one that has less than it may seem.

    Args:
        config: the run's settings.
        dataset: the training samples.
        collator: makes their batches; what it counts is not to be used any further.
        looks: samples to collate, evenly spaced over the file; of a stream, the first ones, of
            which nothing is certain.

    Raises:
        ConfigError: an objective is on and no sample has what it needs; `max_length` cuts all.
        SampleError: every answer is empty; a stream without a usable sample.
    """
    on = [name for name in NEEDS if getattr(config.objectives, name) is not None]
    samples = _First(dataset, looks) if isinstance(dataset, SampleStream) else dataset
    if not len(samples):
        first = f"; the first: {bad[0].where}: {bad[0].reason}" if (bad := dataset.bad) else ""
        raise SampleError(f"{dataset.name}: expected a usable sample, got none{first}")
    _check_file(on, samples)
    _check_looks(on, config, samples, collator, looks)


def _check_file(on: Sequence[str], dataset: JsonLinesDataset | Mixture | _First) -> None:
    """What the index counted in the whole file."""
    name, total, whole = dataset.name, len(dataset), not isinstance(dataset, _First)
    answers, empty = (int(dataset.counts[key].sum()) for key in ("answers", "answers_empty"))
    if empty == answers:
        sentence = f"{name}: expected answers to train on, got {empty:,} that are all empty"
        _say(sentence, certain=whole, error=SampleError)
    elif empty:
        logger.warning(
            "%s: %s of %s answers are empty: only their end of turn is trained",
            name,
            f"{empty:,}",
            f"{answers:,}",
        )
    for field in dict.fromkeys(NEEDS[each][0] for each in on):
        served = [each for each in on if NEEDS[each][0] == field]
        having = int(np.count_nonzero(_carried(dataset, field)))
        if not having:
            _say(
                f"`objectives.{served[0]}`: expected samples with {field} in {name}, got none "
                f"among {'' if whole else 'the first '}{total:,}; {WAYS[field]}",
                certain=whole,
            )
        elif having < total:
            logger.warning(
                "%s: %s of %s samples have %s: the others teach nothing to %s",
                name,
                f"{having:,}",
                f"{total:,}",
                field,
                ", ".join(served),
            )


def _check_looks(
    on: Sequence[str],
    config: Config,
    dataset: JsonLinesDataset | Mixture | _First,
    collator: RobustCollator,
    looks: int,
) -> None:
    """What comes of some samples when they are collated: certain if these are all."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(looks, len(dataset))).round())
    until, seen, refused = time.monotonic() + SECONDS, [], []
    for index in chosen.astype(int).tolist():
        if time.monotonic() > until:
            break
        example = dataset[index]
        try:
            if example is None:
                continue
            collator.collator([example])
        except ValueError as error:  # reported, or what ends the run, when its turn comes
            refused.append(cut(str(error).replace(f"`{example.name}: ", f"{example.name}: `", 1)))
            continue
        seen.append(index)
    if not seen:
        if refused:
            wanted = f"{dataset.name}: expected samples that the model takes"
            tried = f"none of {len(refused):,} that were tried; the first: {refused[0]}"
            _say(f"{wanted}, got {tried}", certain=len(refused) == len(dataset), error=SampleError)
        return
    found, whole = collator.collator.counts, not isinstance(dataset, _First)
    certain = whole and len(seen) == len(dataset)
    of = f"all {len(seen):,} samples" if certain else f"{len(seen):,} of {len(dataset):,} samples"
    of = of if whole else f"the first {len(seen):,} samples"
    if not found["text_rows"]:
        _say(_nothing_left(config, found, of), certain=certain)
    elif found["answers_truncated"]:
        logger.warning(
            "`data.max_length`: %s leaves nothing of %s of %s answers of %s",
            config.data.max_length,
            f"{found['answers_truncated']:,}",
            f"{found['answers']:,}",
            of,
        )
    for name in on:
        field, rows = NEEDS[name]
        if not found[rows] and _carried(dataset, field)[seen].any():
            _say(
                f"`objectives.{name}`: expected {field} that can be used, got none of {of}"
                f"{_lost(found, field)}",
                certain=certain,
            )


def _carried(dataset: JsonLinesDataset | Mixture | _First, field: str) -> np.ndarray:
    """How many of a field each sample has; a video is as good as an image."""
    counts = dataset.counts
    return counts["images"] + counts["videos"] if field == "images" else counts[field]


def _say(sentence: str, *, certain: bool, error: type[Exception] = ConfigError) -> None:
    if certain:
        raise error(sentence)
    logger.warning("%s", sentence)


def _nothing_left(config: Config, found: Counter, of: str) -> str:
    limit = config.data.max_length
    if limit is not None and found["samples_truncated"]:
        return f"`data.max_length`: expected room for answers, got {limit}: it cuts those of {of}"
    return f"`data.train`: expected answers with tokens to train, got none of {of}"


def _lost(found: Counter, field: str) -> str:
    """The collator's counts of what a field lost, in parentheses."""
    kinds = {"regions": _OF_REGIONS}.get(field, (f"{field}_",))
    lost = [f"{name} {n:,}" for name, n in sorted(found.items()) if n and name.startswith(kinds)]
    return f" ({', '.join(lost)})" if lost else ""


class SupervisionWatch(TrainerCallback):
    """Stops a run that has learned nothing: from no answer, or nothing for an objective.

    Args:
        config: the run's settings.
        dataset: the training samples.
        counts: of the batches trained on so far.

    Raises:
        SampleError: from the step at which that is certain.
    """

    def __init__(self, config: Config, dataset: Samples, counts: Counter) -> None:
        self._config, self._counts = config, counts
        self._enough = PATIENCE if isinstance(dataset, SampleStream) else len(dataset)
        self._done = False

    def on_step_end(self, args, state, control, **kwargs):
        if self._done:
            return
        seen, counts = self._counts["samples"], self._counts
        whole = seen >= self._enough
        last = state.global_step >= state.max_steps
        if last and not seen:
            raise SampleError(
                "`data.train`: expected samples that the model takes, got none: each was skipped, "
                "and why is said above"
            )
        if not counts["text_rows"] and (whole or last or seen >= PATIENCE):
            raise SampleError(_nothing_left(self._config, counts, f"{seen:,} samples trained on"))
        if whole:
            self._done = True
            for name, (field, rows) in NEEDS.items():
                if getattr(self._config.objectives, name) is not None and not counts[rows]:
                    raise SampleError(
                        f"`objectives.{name}`: expected {field} that can be used, got none of "
                        f"{seen:,} samples trained on{_lost(counts, field)}"
                    )
