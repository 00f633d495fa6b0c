"""One training run: data and model in; checkpoints, model, metrics, evaluations and report out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from groundkern.hf import GroundingCollator, MeasuredGeometry
from groundkern.trainer import checkpoints, durable, launching, trial, watching
from groundkern.trainer import run_folder as folder
from groundkern.trainer.arguments import further
from groundkern.trainer.collating import RobustCollator
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.controls import controlled
from groundkern.trainer.counting import CountingTrainer, same_bad_samples
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.order import Course, Filled
from groundkern.trainer.geometry import FOLDER, geometry_of, measure_ahead
from groundkern.trainer.heatmaps import heat_maps
from groundkern.trainer.last_step import LastStep
from groundkern.trainer.loading import attach_objectives, load_model
from groundkern.trainer.logs import RunLog
from groundkern.trainer.metrics.held_out import MEASURED, digit_tokens, evaluate, how_measured, pick
from groundkern.trainer.ranks import COLLECTIVES, Ranks, joined
from groundkern.trainer.report import write_report
from groundkern.trainer.stopping import Stopped, StopSignals
from groundkern.trainer.streaming.position import FILE as STREAM
from groundkern.trainer.streaming.stream import SampleStream
from groundkern.trainer.supervised import SupervisionWatch, check_supervision
from groundkern.trainer.training_data import (
    TrainingData,
    epoch_order,
    held_out_data,
    prepare_stream,
    training_data,
)


def train(config: Config, *, before: dict | None = None) -> Path | None:
    """Runs (or continues) what a config describes and writes everything under its output folder.

    Under `torchrun` every process calls it: all train and evaluate, the first one owns the files.

    Args:
        config: validated settings.
        before: an evaluation of the same starting weights on the same data, if there is one.

    Returns:
        The path of the report; None in all processes but the first.

    Raises:
        ConfigError: settings that do not fit what is on disk.
        RankError: another process ended.
        SampleError: no usable sample, or a bad one if bad samples stop the run.
        StorageError: a file could not be written; every whole checkpoint is still there.
        Stopped: SIGTERM or Ctrl-C; `saved` names the checkpoint that continues the run.
    """
    limit = config.training.arguments.get("ddp_timeout", COLLECTIVES)
    with joined(accelerator=True, collectives=limit) as ranks:
        return train_by(ranks, config, before)


def train_by(ranks: Ranks, config: Config, before: dict | None = None) -> Path | None:
    """`train` by processes that have met already.

    Args:
        ranks: all of them, each of which calls this.
        config, before: as `train` takes them.
    """
    output = config.training.output
    beside = config.evaluation.compare
    if beside and not (beside / folder.RECORD).exists():
        raise ConfigError(f"`evaluation.compare`: expected the output of a run, got {beside}")
    launching.check(config)
    ranks = replace(ranks, shared=config.training.context_parallel)
    disable_progress_bar()  # of loading and saving; this program has its own
    with (
        ranks.heard_once(),
        StopSignals().installed() as stop,
        ExitStack() as stack,
    ):
        start = ranks.alone(lambda: _start(config, stack, ranks), "the choice of the checkpoint")
        _refuse_unseen(output)
        try:
            return _Run(config, start, stop, ranks).finish(before)
        except Stopped as stopped:
            if stopped.agreed:
                ranks.wait("the end of the last step")
            stopped.saved = str(next(reversed(checkpoints.listed(output)), ""))
            raise


def _start(config: Config, stack: ExitStack, ranks: Ranks) -> Path | None:
    """Holds the folder until the stack is closed, cleans it, and chooses the checkpoint."""
    stack.enter_context(folder.held(config.training.output))
    checkpoints.clean(config.training.output)
    return checkpoints.find(config, ranks.readers)


def _refuse_unseen(output: Path) -> None:
    """Refuses a folder that the first process holds and this one does not see."""
    if not (output / folder.LOCK).exists():
        raise ConfigError(
            f"`training.output`: expected a folder that all machines share, got {output}, which "
            "the first process holds and another one does not find"
        )


class _Run:
    def __init__(self, config: Config, checkpoint: Path | None, stop: StopSignals, ranks: Ranks):
        self.config, self.checkpoint, self.stop, self.ranks = config, checkpoint, stop, ranks
        self.output, self.started = config.training.output, time.monotonic()
        watching.refuse_trackers(config.training.report_to)
        watching.refuse_fp16(config)
        trial.try_arguments(config)
        self.best: dict[str, Any] | None = None  # the checkpoint that became the model
        self.train_set, self.test_set = ranks.alone(self._data, "the check of the data")
        self.model, self.processor = load_model(config)
        self.vocabulary = self.model.get_output_embeddings().weight.shape[0]
        trial.refuse_no_target(self.model, config)
        kept = self.output / FOLDER
        self.geometry = geometry_of(self.model, self.processor, config.data.geometry, cache=kept)
        if isinstance(self.geometry, MeasuredGeometry) and torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())  # as the Trainer does later
        if isinstance(self.train_set, SampleStream):
            model = self.processor, self.model.config
            prepare_stream(config, self.train_set, self.geometry, ranks, *model)
        elif config.training.workers or ranks.size > 1:  # later a model may be in pieces
            measure_ahead(self.geometry, [x for x in (self.train_set, self.test_set) if x])
        self.counts = checkpoints.read_counts(checkpoint) if checkpoint else Counter()
        self.log = RunLog(config, self.counts, writes=ranks.first)
        self.course = self._course()
        ranks.alone(self._check_supervision, "the look at the samples")

    def _data(self) -> tuple[TrainingData, JsonLinesDataset | None]:
        """Both data sets, checked by the first process and sent to the others as they are."""
        train_set = training_data(self.config)
        if self.checkpoint is not None:
            checkpoints.refuse_other_data(self.checkpoint, self.config, train_set.digest)
        return train_set, held_out_data(self.config)

    def _course(self) -> Course:
        settings = self.config.training
        size = settings.batch_size * self.ranks.readers
        if isinstance(self.train_set, SampleStream):  # has no epochs, and keeps its own position
            samples = settings.steps * settings.accumulation * size
            return Course(samples, size, settings.accumulation)
        course = Course(self.train_set.in_epoch, size, settings.accumulation)
        if self.checkpoint is None:
            return course
        return checkpoints.read_position(self.checkpoint, self.train_set.digest, course)

    def _check_supervision(self) -> None:
        check_supervision(self.config, self.train_set, self._collator(self.train_set))

    def finish(self, before: dict | None) -> Path | None:
        """Evaluates, trains, saves, evaluates again and reports."""
        trainer = self._trainer()
        self.sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        self.even = trainer.even_ranks.evaluated if self.sharded else None
        self.whole = trainer.whole_sequences
        self.ranks.alone(self._begin, "the folder to be ready")
        if self.checkpoint is None:
            evaluation = partial(self._evaluate, "before", before)
            if self.sharded:  # in parts and on its devices, once training begins
                trainer.callback_handler.callbacks.insert(0, _AtBeginning(evaluation))
            else:
                evaluation()
        self._train(trainer)
        self._take_best(trainer)
        with checkpoints.aside(self.output, folder.MODEL, self.ranks) as model:
            trainer.save_model(str(model))
            if self.ranks.first:
                self.processor.save_pretrained(model)
        self._evaluate("after", None)
        report = self.ranks.alone(self._report, "the report")
        return report if self.ranks.first else None

    def _report(self) -> Path:
        durable.write_json(self.output / folder.RECORD, self._record())
        return write_report(self.output, self.config.evaluation.compare)

    def _trainer(self) -> CountingTrainer:
        attach_objectives(self.model, self.config, self.processor)
        epochs, streamed = self.config.training.epochs, isinstance(self.train_set, SampleStream)
        order = None
        if not streamed:
            model = self.processor, self.model.config
            order = epoch_order(self.config, self.train_set, self.course, *model)
        trainer = CountingTrainer(
            model=self.model,
            args=_arguments(self.config, self.course, self.ranks.size),
            train_dataset=self.train_set if streamed else Filled(self.train_set),
            eval_dataset=self._held_out(),
            held_out=None if self.test_set is None else self._collator(self.test_set),
            data_collator=self._collator(self.train_set),
            callbacks=[
                self.log,
                SupervisionWatch(self.config, self.train_set, self.counts),
                watching.Watching(self.config, self.ranks),
            ],
            max_nonfinite=self.config.training.max_nonfinite,
            term_norms_every=self.config.training.term_norms_every,
            config=self.config,
            train_digest=self.train_set.digest,
            counts=self.counts,
            bad=self.train_set.bad,
            order=order,
            stream_from=self._stream_from(),
            course=self.course,
            last=None if epochs is None else self.course.end(epochs),
            ranks=self.ranks,
            context_order=self.config.training.context_order,
            context_engine=self.config.training.context_engine,
        )
        trainer.remove_callback(PrinterCallback)
        fsdp = trainer.is_fsdp_enabled and trainer.args.bf16
        copied = trainer.is_deepspeed_enabled or fsdp
        trial.warn_of_lost_updates(self.model, trainer.args, fp32_copies=copied)
        last = LastStep(self.stop, self.ranks, trainer.has_news, trainer.exchange)
        handler = trainer.callback_handler.callbacks
        handler.insert(handler.index(self.log), last)  # the others act on what it exchanges
        return trainer

    def _stream_from(self) -> dict[str, Any] | None:
        """Where the checkpoint was in a stream, if it was in this one."""
        if self.checkpoint is None or not (self.checkpoint / STREAM).exists():
            return None
        same = checkpoints.same_data(self.checkpoint, self.train_set.digest)
        return durable.read_json(self.checkpoint / STREAM) if same else None

    def _held_out(self) -> Dataset | None:
        if self.test_set is None:
            return None
        return watching.held_out_set(self.test_set.tasks, self.test_set, self.config)

    def _collator(self, samples: TrainingData, **options: Any) -> RobustCollator:
        smam, klal = self.config.objectives.smam, self.config.objectives.klal
        kept = {"keep_registers": smam is not None and smam.keep == "registers"}
        settings = self.config.supervision.model_dump() | kept | options
        data = self.config.data
        collator = GroundingCollator(
            self.processor,
            self.model.config,
            max_length=data.max_length,
            pack_to=data.pack_to if samples is self.train_set else None,
            pad_to_multiple_of=launching.multiple(self.config),
            lens=self.config.objectives.logit_lens is not None,
            contrast=self.config.objectives.patch_text is not None,
            query_tokens=klal is not None and klal.by_queries,
            geometry=self.geometry,
            **({} if samples is not self.train_set else controlled(self.config, samples)),
            **settings,
        )
        return RobustCollator(collator, data.on_bad_sample, samples)

    def _begin(self) -> None:
        """Puts away what is of another line than the steps to come."""
        step = checkpoints.step_of(self.checkpoint) if self.checkpoint else 0
        away = checkpoints.roll_back(self.output, self.checkpoint)
        folder.keep_metrics(self.output, step)
        if self.checkpoint is not None:
            print(f"Continuing from {self.checkpoint}, step {step}.")
            if self.course.moved:
                at = self.course.taken / self.course.samples
                print(
                    f"A step now takes {self.course.size * self.course.accumulation} samples, "
                    f"another number than before: it goes on at epoch {at:.4g} of the data."
                )
        if away is not None:
            print(f"What {self.output} held beyond it is now in {away}.")
        if self.checkpoint is not None:  # a run may have ended before it removed what is too old
            state, there = watching.load_state(self.checkpoint), watching.steps_there(self.output)
            best = watching.best_step(state, self.config.evaluation, there)
            checkpoints.rotate(self.output, self.config.training.keep, best=best)

    def _train(self, trainer: CountingTrainer) -> None:
        with closing(self.log):
            if self.checkpoint is None:
                trainer.train()
            elif not watching.finished(self.checkpoint, self.config, trainer.args.max_steps):
                trainer.train(resume_from_checkpoint=str(self.checkpoint))
            else:  # the Trainer would train one more step
                trainer._load_from_checkpoint(str(self.checkpoint))
        if self.stop.number:
            raise Stopped(self.stop.number, agreed=True)

    def _take_best(self, trainer: CountingTrainer) -> None:
        """Puts the weights of the best checkpoint in the place of the last ones."""
        self.best = self.ranks.alone(
            lambda: watching.best_of(self.output, self.config.evaluation), "the best checkpoint"
        )
        if self.best is not None:
            trainer._load_from_checkpoint(self.best["checkpoint"])
            print("The best {metric}, {value:.4g}, is of step {step}.".format(**self.best))
        best = None if self.best is None else self.best["step"]
        if self.ranks.first:
            checkpoints.rotate(self.output, self.config.training.keep, best=best)

    def _evaluate(self, when: str, known: dict | None) -> None:
        if self.test_set is None:
            return
        if known is None:
            with self.whole():  # the figures of a sample are read where it is whole
                known = self._measure(f"evaluating {when}")
        if self.ranks.first:
            durable.write_json(self.output / f"evaluation-{when}.json", known)

    def _measure(self, title: str) -> dict[str, Any]:
        settings, autocast = self.config.evaluation, watching.autocast_type(self.config)
        picked = pick(self.test_set.tasks, settings.samples)
        regions = {"region_dilation": 0.0, "keep_registers": False}  # as they are
        collator = self._collator(self.test_set, **MEASURED, **regions)
        figures = evaluate(
            self.model,
            collator,
            picked,
            self.test_set,
            digits=digit_tokens(self.processor.tokenizer, self.vocabulary),
            batch_size=settings.batch_size,
            autocast=autocast,
            title=title,
            ranks=self.ranks,
            even=self.even,
        )
        same_bad_samples(self.test_set.bad, self.ranks)
        maps: list[dict] = []
        if self.ranks.first or self.sharded:  # sharded weights are gathered by all
            maps = heat_maps(
                self.model,
                collator,
                picked,
                self.test_set,
                limit=settings.heatmaps,
                autocast=autocast,
            )
        return {"tasks": figures, "heat_maps": maps, "measured": how_measured()}

    def _record(self) -> dict[str, Any]:
        rows = folder.read_metrics(self.output)
        trained = [row for row in rows if "loss" in row]
        parameters = list(self.model.parameters())
        sets = {"train": self.train_set, "test": self.test_set}
        return {
            "versions": folder.versions(),
            "machine": folder.machine(),
            "processes": self.ranks.size,
            "config": self.config.model_dump(mode="json"),
            "parameters": sum(map(_size, parameters)),
            "trained_parameters": sum(_size(p) for p in parameters if p.requires_grad),
            "steps": rows[-1]["step"] if rows else 0,
            "best": self.best,
            "seconds": round(time.monotonic() - self.started, 1),
            "continued_from": str(self.checkpoint) if self.checkpoint else None,
            "samples": {
                name: data.bad.total if isinstance(data, SampleStream) else len(data)
                for name, data in sets.items()
                if data is not None
            },
            "bad_samples": {
                name: {
                    "count": len(data.bad),
                    "first": [{"where": bad.where, "reason": bad.reason} for bad in data.bad[:20]],
                }
                for name, data in sets.items()
                if data is not None
            },
            "supervision": dict(self.counts),
            "final_losses": {name: trained[-1].get(name) for name in folder.loss_terms(trained)},
        }


class _AtBeginning(TrainerCallback):
    """Does something when the model is ready for the first step, and no step is running yet."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self._action()


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty one


def _arguments(config: Config, course: Course, processes: int) -> TrainingArguments:
    settings = config.training
    steps = settings.steps or course.until(settings.epochs)
    given = further(config)
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        lr_scheduler_type=given.pop("lr_scheduler_type", settings.scheduler),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        fp16=settings.fp16,
        eval_strategy="no" if config.evaluation.every is None else "steps",
        eval_steps=config.evaluation.every,
        per_device_eval_batch_size=config.evaluation.batch_size,
        prediction_loss_only=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=given.pop("dataloader_pin_memory", torch.cuda.is_available()),
        ignore_data_skip=config.data.streaming,  # a stream goes on by itself
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # a NaN loss must be seen
        save_steps=settings.save_every,
        report_to=settings.report_to or "none",
        disable_tqdm=True,  # RunLog has the bar
        remove_unused_columns=False,
        parallelism_config=launching.parallelism(config, processes),
        **given,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: DataParallel cuts batches
    return arguments
