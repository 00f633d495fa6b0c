"""One evaluation from its options to its report: continued where it was stopped, in one process or
in several, each of which answers every N-th batch and writes a file of its own."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from groundkern.trainer import durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import DataChanged, SampleError
from groundkern.trainer.differences import differences as changed
from groundkern.trainer.evaluation import rows as rowing
from groundkern.trainer.evaluation import work
from groundkern.trainer.evaluation.models import Named, named
from groundkern.trainer.evaluation.opening import open_data
from groundkern.trainer.evaluation.results import Results, read_other
from groundkern.trainer.evaluation.rows import Row, Rows, identity
from groundkern.trainer.evaluation.scoring import check_names
from groundkern.trainer.metrics.held_out import how_measured, pick
from groundkern.trainer.progress import progress
from groundkern.trainer.ranks import Ranks, joined
from groundkern.trainer.stopping import Stopped

PARTS, SETTINGS = "parts", "settings.json"
ANSWERS, FIGURES = "answers", "figures"


def evaluate(arguments: Namespace) -> Path | None:
    """Runs (or continues) an evaluation and writes everything under `arguments.output`.

    Args:
        arguments: of `command.add_arguments`.

    Returns:
        The path of the report; None in all processes but the first.

    Raises:
        ConfigError: options that do not fit one another, the model, or what is in the folder.
        SampleError: no usable sample, or a bad one if bad samples stop the evaluation.
        StorageError: a file could not be written; what was answered before is there.
        RankError: another process ended.
        Stopped: SIGTERM or Ctrl-C; `saved` names the folder, if anything was answered.
    """
    disable_progress_bar()
    output = arguments.output
    check_names(arguments.metrics)
    model = named(arguments.model, arguments.adapter)
    with joined(arguments.timeout) as ranks:
        lock = folder.held(output, named="--output") if ranks.first else nullcontext()
        with lock:
            try:
                return _Evaluation(arguments, ranks, model).finish()
            except Stopped as stopped:
                stopped.saved = str(output) if any(_parts(output, "*")) else ""
                raise


class _Evaluation:
    def __init__(self, arguments: Namespace, ranks: Ranks, model: Named) -> None:
        self.arguments, self.ranks, self.named = arguments, ranks, model
        self.output, self.started = arguments.output, time.monotonic()
        self.device = ranks.device(arguments.device)
        self.dtype = arguments.dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        if ranks.first:
            self.other = read_other(arguments.compare, self.output)
            self.dataset = self._data()
            self._agree()
        ranks.wait("the check of the data and the model")
        if not ranks.first:
            self.dataset = self._data()
        self.hashes = [identity(each) for each in self.dataset.hashes]
        self.samples = work.Samples(self.dataset, arguments.on_bad_sample)
        picked = pick(self.dataset.tasks, arguments.samples)
        self.picked = sorted(index for indices in picked.values() for index in indices)
        self.refused: str | None = None  # why it cannot be seen where the model looks
        self.grounding: Any = None

    def finish(self) -> Path | None:
        """Answers, measures, and in the first process scores and reports."""
        answered, measured = self._read(ANSWERS), self._read(FIGURES)
        self.ranks.wait("the first question")  # none writes while another still reads
        model = processor = None
        todo, to_measure = self._open(answered), self._regions(self._open(self._whole(measured)))
        if todo or to_measure or self._pictures():
            model, processor = self._load()
        if todo:
            self._answer(todo, model, processor)
        if model is not None:
            self._measure(to_measure, model, processor)
        self.ranks.wait("the end of the answers")
        if not self.ranks.first:
            return None
        results = Results(
            self.arguments,
            dataset=self.dataset,
            picked=self.picked,
            answers=self._read(ANSWERS),
            figures={} if self.arguments.no_grounding else self._read(FIGURES),
            other=self.other,
            refused=self.refused,
            record=self._record(),
        )
        return results.write(self.grounding)

    def _data(self) -> JsonLinesDataset:
        return open_data(
            self.arguments,
            self.named.processor,
            folder=self.output / "data",
            cache=self.output,
            shown=self.ranks.first,
        )

    def _agree(self) -> None:
        """Records what answers and figures depend on, or refuses those of other settings."""
        options = self.arguments
        now = {
            "model": self.named.identity(),
            "data": {"sha256": self.dataset.digest, "root": str(self.dataset.root.resolve())},
            "max_new_tokens": options.max_new_tokens,
            "dtype": self.dtype,
            "attn_implementation": options.attn_implementation,
            "allowed_tokens": sorted(options.allowed_tokens),
            "measured": how_measured(),
        }
        if self.dataset.counts["videos"].any():
            now["videos"] = {"fps": options.video_fps, "frames": options.video_frames}
        self.settings = now
        path = self.output / PARTS / SETTINGS
        if not any(path.stat().st_size for path in _parts(self.output, "*")):
            durable.write_json(path, now)  # nothing depends on what an earlier start wrote here
            return
        try:
            before = durable.read_json(path)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"--output: {path} cannot be read: {error}") from None
        if not isinstance(before, dict) or (others := changed(before, now)):
            what = "; ".join(others) if isinstance(before, dict) else "no settings"
            raise ConfigError(
                f"--output: {self.output} holds an evaluation of other settings ({what}); choose "
                "another folder"
            )

    def _read(self, kind: str) -> dict[int, Row]:
        fits = rowing.is_answer if kind == ANSWERS else rowing.is_measured
        parts = (rowing.read_rows(path, fits) for path in _parts(self.output, kind))
        return rowing.newest((row for part in parts for row in part), self.hashes)

    def _open(self, done: dict[int, Row]) -> list[int]:
        """The samples without a row, or with an error, which may have been mended."""
        return [i for i in self.picked if i not in done or "error" in done[i]]

    def _whole(self, measured: dict[int, Row]) -> dict[int, Row]:
        """The rows that have all figures asked for: GradCAM may be asked for later."""
        if not self.arguments.gradcam:
            return measured
        lacks = {i for i, row in measured.items() if rowing.lacks_gradcam(row)}
        return {i: row for i, row in measured.items() if i not in lacks}

    def _regions(self, indices: list[int]) -> list[int]:
        """Those of the samples that it can be measured on where the model looks."""
        if self.arguments.no_grounding:
            return []
        return [i for i in indices if self.dataset.counts["regions"][i]]

    def _pictures(self) -> bool:
        return self.ranks.first and self.arguments.failures > 0 and bool(self._regions(self.picked))

    def _load(self) -> tuple[Any, Any]:
        model, processor = self.named.load(
            dtype=self.dtype, attn_implementation=self.arguments.attn_implementation
        )
        return model.to(self.device), processor

    def _answer(self, todo: list[int], model: Any, processor: Any) -> None:
        from groundkern.trainer.evaluation.generating import Answerer
        from groundkern.trainer.evaluation.questions import Asking

        try:
            asking = Asking(processor, tuple(self.arguments.allowed_tokens))
        except ValueError as error:
            raise ConfigError(f"--allowed-tokens: {error}") from None
        answerer = Answerer(model, processor, max_new_tokens=self.arguments.max_new_tokens)
        size, mine = self.arguments.batch_size, self._share(todo)
        ahead = self.device.type != "cpu"  # on a CPU it would take the model's cores
        batches = work.answers(self.samples, mine, size, asking, answerer, ahead=ahead)
        self._keep(ANSWERS, mine, batches)

    def _measure(self, indices: list[int], model: Any, processor: Any) -> None:
        """Measures where the model looks; `refused` says why not."""
        shown = self._regions(self.picked)
        if not shown:
            return
        from groundkern.trainer.evaluation.grounding import Grounding

        try:
            grounding = Grounding(
                model,
                processor,
                allowed=tuple(self.arguments.allowed_tokens),
                gradcam=self.arguments.gradcam,
            )
            grounding.examine(self._examples(shown))
        except (ValueError, TypeError) as error:
            self.refused = str(error)
            if self.ranks.first:
                print(f"Where it looks is not measured: {error}", flush=True)
            return
        self.grounding = grounding
        size, mine = self.arguments.batch_size, self._share(indices)
        ahead = self.device.type != "cpu"
        batches = work.figures(self.samples, mine, size, self.grounding, ahead=ahead)
        self._keep(FIGURES, mine, batches)

    def _examples(self, indices: list[int]) -> Iterator[Any]:
        """Those of some samples that can be loaded, the same in every process."""
        for index in indices:
            try:
                yield self.dataset.sample(index).load()
            except DataChanged:
                raise
            except SampleError:  # is told when its turn comes
                continue

    def _share(self, indices: list[int]) -> list[int]:
        size = self.arguments.batch_size
        chunks = [indices[at : at + size] for at in range(0, len(indices), size)]
        return [index for chunk in self.ranks.share(chunks) for index in chunk]

    def _keep(self, kind: str, mine: list[int], batches: Iterator[list[Row]]) -> None:
        """Appends the rows of each batch as it comes."""
        rows = Rows(_part(self.output, kind, self.ranks.rank))
        title = "answering" if kind == ANSWERS else "looking"
        shown = self.ranks.first
        with progress(title, total=len(mine), unit="sample", shown=shown) as bar:
            for batch in batches:
                rows.add(batch)
                bar.update(len(batch))

    def _record(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "versions": folder.versions(),
            "machine": folder.machine(),
            "processes": self.ranks.size,
            "device": str(self.device),
            "seconds": round(time.monotonic() - self.started, 1),
            "model": self.arguments.model,
            "adapter": self.arguments.adapter,
        }


def _part(output: Path, kind: str, rank: int) -> Path:
    return output / PARTS / f"{kind}-{rank}.jsonl"


def _parts(output: Path, kind: str) -> Iterable[Path]:
    return sorted((output / PARTS).glob(f"{kind}-*.jsonl"))
