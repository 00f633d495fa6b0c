"""The two passes over the samples: the model's own answers, and its figures on the gold ones.

Each is a generator of the rows of one batch after the other; what goes wrong with a sample is a row
with its error, and the samples beside it are not harmed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from groundkern.hf import GroundedExample
from groundkern.hf.data.example import message_text
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import DataChanged, SampleError
from groundkern.trainer.data.sample import Sample
from groundkern.trainer.evaluation.generating import Answerer
from groundkern.trainer.evaluation.grounding import Grounding
from groundkern.trainer.evaluation.questions import Asking, Question
from groundkern.trainer.evaluation.rows import Row, identity
from groundkern.trainer.metrics.places import Size
from groundkern.trainer.metrics.registry import gold_of

WINDOW = 32  # batches whose samples are put in the order of their length
_PIXELS, _LETTERS = 784, 4  # of a token, about


class Samples:
    """The samples of a data set by their index, and their rows.

    Args:
        dataset: where they are.
        on_bad_sample: "skip" makes a row of what is wrong with a sample, "stop" raises it.
    """

    def __init__(self, dataset: JsonLinesDataset, on_bad_sample: str) -> None:
        self.dataset, self._stop = dataset, on_bad_sample == "stop"

    def row(self, index: int, **fields: Any) -> Row:
        """A row of sample `index`."""
        return {"sample": index, "hash": identity(self.dataset.hashes[index]), **fields}

    def bad(self, index: int, error: Exception) -> Row:
        """The row of a sample that cannot be used.

        Raises:
            SampleError: if bad samples stop the evaluation.
        """
        if self._stop:
            raise error if isinstance(error, SampleError) else SampleError(str(error))
        return self.row(index, error=str(SampleError(str(error))))

    def batches(
        self, indices: Sequence[int], size: int
    ) -> Iterator[tuple[list[tuple[int, Sample]], list[Row]]]:
        """Batches of samples of about the same length, the longest of some first, so that a batch
        that does not fit in memory shows early; and the rows of those that cannot be used."""
        for start in range(0, len(indices), size * WINDOW):
            found, bad = [], []
            for index in indices[start : start + size * WINDOW]:
                try:
                    found.append((index, self.dataset.sample(index)))
                except DataChanged:
                    raise
                except SampleError as error:
                    bad.append(self.bad(index, error))
            found.sort(key=lambda pair: _length(pair[1]), reverse=True)
            if bad:
                yield [], bad
            for at in range(0, len(found), size):
                yield found[at : at + size], []

    def loaded(self, batch: list[tuple[int, Sample]], rows: list[Row]) -> dict[int, Any]:
        """The examples of a batch with their pixels; a row for each that has none is added."""
        found = {}
        for index, sample in batch:
            try:
                found[index] = sample.load()
            except SampleError as error:
                rows.append(self.bad(index, error))
        return found


class Batch(NamedTuple):
    """A batch for the model, and the rows of the samples that are not in it.

    Args:
        inputs: keyword inputs of the model, on the CPU; None: no sample is left.
        golds: {sample: what is right}, in the order of the inputs; {sample: []} where no one asks.
        rows: of those that cannot be used.
        resized: {sample: (width, height) of what the processor made of its first image}.
    """

    inputs: Any
    golds: dict[int, list[str]]
    rows: list[Row]
    resized: Mapping[int, Size] = MappingProxyType({})


def answers(
    samples: Samples,
    indices: Sequence[int],
    size: int,
    asking: Asking,
    answerer: Answerer,
    *,
    ahead: bool = False,
) -> Iterator[list[Row]]:
    """The rows of the model's own answers, batch by batch.

    Args:
        samples, indices, size: what is asked, and how many of them at once.
        asking, answerer: of the model.
        ahead: prepare the next batch in a thread while the model writes.

    Raises:
        SampleError: a bad sample, if these stop the evaluation.
        ConfigError: a batch does not fit in memory.
    """
    batches = _questions(samples, indices, size, asking, answerer)
    for inputs, golds, rows, resized in _ahead(batches) if ahead else batches:
        if inputs is not None:
            with _Memory():
                written = answerer.answer(inputs)
            for (index, gold), answer in zip(golds.items(), written, strict=True):
                said = {"prediction": asking.plain(answer.text), "gold": gold}
                if answer.raw.strip() != said["prediction"]:
                    said["raw"] = answer.raw
                if index in resized:
                    said["resized"] = list(resized[index])
                how = {"tokens": answer.tokens, "ended": answer.ended}
                rows.append(samples.row(index, **said, **how))
        yield rows


def figures(
    samples: Samples,
    indices: Sequence[int],
    size: int,
    grounding: Grounding,
    *,
    ahead: bool = False,
) -> Iterator[list[Row]]:
    """The rows of the teacher-forced figures, batch by batch; arguments as for `answers`.

    Raises:
        SampleError: a bad sample, if these stop the evaluation.
        ConfigError: a batch does not fit in memory.
    """
    batches = _examples(samples, indices, size, grounding)
    for inputs, golds, rows, _ in _ahead(batches) if ahead else batches:
        if inputs is not None:
            with _Memory():
                measured = grounding.measure(inputs)
            for index, found in zip(golds, measured, strict=True):
                rows.append(samples.row(index, figures=found))
        yield rows


def _questions(
    samples: Samples, indices: Sequence[int], size: int, asking: Asking, answerer: Answerer
) -> Iterator[Batch]:
    for batch, rows in samples.batches(indices, size):
        questions: dict[int, Question] = {}
        golds: dict[int, list[str]] = {}
        known = dict(batch)
        for index, example in samples.loaded(batch, rows).items():
            try:
                right = gold_of(known[index]).answers
                questions[index] = asking.question(example)
                golds[index] = [asking.plain(text) for text in right]
            except SampleError as error:
                rows.append(samples.bad(index, error))
        inputs = _together(samples, questions, answerer.inputs, rows)
        sizes = answerer.resized([*questions.values()], inputs) if questions else ()
        resized = {index: size for index, size in zip(questions, sizes) if size is not None}
        yield Batch(inputs, {index: golds[index] for index in questions}, rows, resized)


def _examples(
    samples: Samples, indices: Sequence[int], size: int, grounding: Grounding
) -> Iterator[Batch]:
    for batch, rows in samples.batches(indices, size):
        examples: dict[int, GroundedExample] = samples.loaded(batch, rows)
        inputs = _together(samples, examples, grounding.inputs, rows)
        yield Batch(inputs, {index: [] for index in examples}, rows)


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, each next one prepared in a thread while the last is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def _together(
    samples: Samples, parts: dict[int, Any], make: Callable[[list], Any], rows: list[Row]
) -> Any:
    """What `make` makes of all parts together; those that it does not take leave `parts`, with a
    row each. None if nothing is left."""
    try:
        return make([*parts.values()]) if parts else None
    except (ValueError, TypeError):  # whose is it?
        for index in [*parts]:
            try:
                make([parts[index]])
            except (ValueError, TypeError) as error:
                rows.append(samples.bad(index, error))
                del parts[index]
    return make([*parts.values()]) if parts else None


class _Memory:
    """Makes an error for the user of an accelerator's memory that runs out."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise ConfigError(
                "--batch-size: a batch does not fit in the accelerator's memory; the same command "
                "with a smaller one continues"
            ) from None


def _length(sample: Sample) -> float:
    """About how many tokens a sample has."""
    letters = sum(len(message_text(message)) for message in sample.messages)
    pixels = sum(w * h for w, h in sample.sizes)
    pixels += sum(v.size[0] * v.size[1] * v.planned for v in sample.videos)
    return pixels / _PIXELS + letters / _LETTERS
