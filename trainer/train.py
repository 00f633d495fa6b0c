"""One training run: data and model in; checkpoints, model, metrics, evaluations and report out."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from groundkern.hf import GroundingCollator, MeasuredGeometry
from trainer import checkpoints, durable, watching
from trainer import run_folder as folder
from trainer.config import Config, ConfigError
from trainer.data.collating import RobustCollator
from trainer.data.dataset import JsonLinesDataset
from trainer.data.mixture import Mixture
from trainer.data.epochs import EpochOrder
from trainer.data.supervised import SupervisionWatch, check_supervision
from trainer.geometry import FOLDER, geometry_of, measure_ahead
from trainer.heatmaps import heat_maps
from trainer.last_step import LastStep
from trainer.loading import attach_objectives, load_model
from trainer.logs import CountingTrainer, RunLog
from trainer.metrics.held_out import MEASURED, digit_tokens, evaluate, how_measured, pick
from trainer.report import write_report
from trainer.stopping import Stopped, StopSignals
from trainer.streaming.position import FILE as STREAM
from trainer.streaming.stream import SampleStream
from trainer.training_data import epoch_order, held_out_data, prepare_stream, training_data


def train(config: Config, *, before: dict | None = None) -> Path:
    """Runs (or continues) what a config describes and writes everything under its output folder.

    Args:
        config: validated settings.
        before: an evaluation of the same starting weights on the same data, if there is one.

    Returns:
        The path of the report.

    Raises:
        ConfigError: settings that do not fit what is on disk.
        SampleError: no usable sample, or a bad one if bad samples stop the run.
        StorageError: a file could not be written; every whole checkpoint is still there.
        Stopped: SIGTERM or Ctrl-C; `saved` names the checkpoint that continues the run.
    """
    output = config.training.output
    beside = config.evaluation.compare
    if beside and not (beside / folder.RECORD).exists():
        raise ConfigError(f"`evaluation.compare`: expected the output of a run, got {beside}")
    disable_progress_bar()  # of loading and saving; this program has its own
    with folder.held(output), StopSignals().installed() as stop:
        checkpoints.clean(output)
        try:
            return _Run(config, checkpoints.find(config), stop).finish(before)
        except Stopped as stopped:
            stopped.saved = str(next(reversed(checkpoints.listed(output)), ""))
            raise


class _Run:
    def __init__(self, config: Config, checkpoint: Path | None, stop: StopSignals):
        self.config, self.checkpoint, self.stop = config, checkpoint, stop
        self.output, self.started = config.training.output, time.monotonic()
        self.log = RunLog(config)
        watching.refuse_trackers(config.training.report_to)
        watching.refuse_fp16(config)
        self.best: dict[str, Any] | None = None  # the checkpoint that became the model
        self.train_set = training_data(config)
        if checkpoint is not None:
            checkpoints.refuse_other_data(checkpoint, config, self.train_set.digest)
        self.test_set = held_out_data(config)
        self.model, self.processor = load_model(config)
        kept = self.output / FOLDER
        self.geometry = geometry_of(self.model, self.processor, config.data.geometry, cache=kept)
        if isinstance(self.geometry, MeasuredGeometry) and torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())  # as the Trainer does later
        if isinstance(self.train_set, SampleStream):
            model = self.processor, self.model.config
            prepare_stream(config, self.train_set, *model, self.geometry)
        elif config.training.workers:
            measure_ahead(self.geometry, [x for x in (self.train_set, self.test_set) if x])
        self.counts = checkpoints.read_counts(checkpoint) if checkpoint else Counter()
        check_supervision(config, self.train_set, self._collator(self.train_set))

    def finish(self, before: dict | None) -> Path:
        """Evaluates, trains, saves, evaluates again and reports."""
        trainer = self._trainer()
        self._begin()
        if self.checkpoint is None:
            self._evaluate("before", before)
        self._train(trainer)
        self._take_best(trainer)
        with checkpoints.aside(self.output, folder.MODEL) as model:
            trainer.save_model(str(model))
            self.processor.save_pretrained(model)
        self._evaluate("after", None)
        durable.write_json(self.output / folder.RECORD, self._record())
        return write_report(self.output, self.config.evaluation.compare)

    def _trainer(self) -> CountingTrainer:
        attach_objectives(self.model, self.config)
        args, order = _arguments(self.config, self.train_set), None
        if not isinstance(self.train_set, SampleStream):
            model = self.processor, self.model.config
            order = epoch_order(self.config, self.train_set, *model, args.world_size)
        trainer = CountingTrainer(
            model=self.model,
            args=args,
            train_dataset=self.train_set,
            eval_dataset=self._held_out(),
            held_out=None if self.test_set is None else self._collator(self.test_set),
            data_collator=self._collator(self.train_set),
            callbacks=[
                LastStep(self.stop),
                self.log,
                SupervisionWatch(self.config, self.train_set, self.counts),
                watching.Watching(self.config),
                EpochOrder(order),
            ],
            max_nonfinite=self.config.training.max_nonfinite,
            term_norms_every=self.config.training.term_norms_every,
            config=self.config,
            train_digest=self.train_set.digest,
            counts=self.counts,
            bad=self.train_set.bad,
            order=order,
            stream_from=self._stream_from(),
        )
        trainer.remove_callback(PrinterCallback)
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

    def _collator(
        self, samples: JsonLinesDataset | Mixture | SampleStream, **options: Any
    ) -> RobustCollator:
        settings, data = self.config.supervision.model_dump() | options, self.config.data
        collator = GroundingCollator(
            self.processor,
            self.model.config,
            max_length=data.max_length,
            lens=self.config.objectives.logit_lens is not None,
            geometry=self.geometry,
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
            raise Stopped(self.stop.number)

    def _take_best(self, trainer: CountingTrainer) -> None:
        """Puts the weights of the best checkpoint in the place of the last ones."""
        self.best = watching.best_of(self.output, self.config.evaluation)
        if self.best is not None:
            trainer._load_from_checkpoint(self.best["checkpoint"])
            print("The best {metric}, {value:.4g}, is of step {step}.".format(**self.best))
        best = None if self.best is None else self.best["step"]
        checkpoints.rotate(self.output, self.config.training.keep, best=best)

    def _evaluate(self, when: str, known: dict | None) -> None:
        if self.test_set is None:
            return
        if known is None:
            known = self._measure(f"evaluating {when}")
        durable.write_json(self.output / f"evaluation-{when}.json", known)

    def _measure(self, title: str) -> dict[str, Any]:
        settings, autocast = self.config.evaluation, watching.autocast_type(self.config)
        picked = pick(self.test_set.tasks, settings.samples)
        collator = self._collator(self.test_set, **MEASURED)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        figures = evaluate(
            self.model,
            collator,
            picked,
            self.test_set,
            digits=digit_tokens(self.processor.tokenizer, vocabulary),
            batch_size=settings.batch_size,
            autocast=autocast,
            title=title,
        )
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
            "config": self.config.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
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


def _steps(config: Config, samples: JsonLinesDataset | Mixture) -> int:
    """The steps of the epochs that the settings want."""
    settings = config.training
    batches = math.ceil(samples.in_epoch / settings.batch_size)
    return math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))


def _arguments(
    config: Config, samples: JsonLinesDataset | Mixture | SampleStream
) -> TrainingArguments:
    settings = config.training
    steps = settings.steps or _steps(config, samples)
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.scheduler,
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
        dataloader_pin_memory=torch.cuda.is_available(),
        ignore_data_skip=config.data.streaming,  # a stream goes on by itself
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # a NaN loss must be seen
        save_steps=settings.save_every,
        report_to=settings.report_to or "none",
        disable_tqdm=True,  # RunLog has the bar
        remove_unused_columns=False,
        **(checkpointing if config.model.gradient_checkpointing else {}),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: DataParallel cuts batches
    return arguments
