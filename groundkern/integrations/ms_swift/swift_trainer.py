"""ms-swift's trainer of supervised fine-tuning with grounding losses, and its batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from swift.trainers.seq2seq_trainer import Seq2SeqTrainer
from transformers import PretrainedConfig

from groundkern.hf import attach
from groundkern.hf.model.support import base_model
from groundkern.hf.watching.even_ranks import ROWS
from groundkern.integrations.ms_swift.swift_registry import registered
from groundkern.integrations.shared.records import COLUMN, grounded_example, with_boxes
from groundkern.integrations.shared.sequences import SequenceRows
from groundkern.integrations.shared.settings import Settings
from groundkern.integrations.shared.training import ProgramMixin, refuse
from groundkern.trainer.data.images import wrong
from groundkern.trainer.prepare.boxes.settings import BoxSettings

OFF = {
    "args": (
        "use_liger_kernel",
        "enable_dft_loss",
        "enable_channel_loss",
        "predict_with_generate",
        "loss_type",
        "use_logits_to_keep",
    ),
    "template": ("padding_free", "packing"),
}
"""Options that replace the forward, the loss or the batches, and have to be off."""
NOT_OF_MODEL = (
    "compute_loss_func",
    "text_position_ids",
    "channel",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


class GroundingBatches:
    """ms-swift's collator, with the rows of what its samples supervise.

    Args:
        own: makes ms-swift's batch.
        template: of the run.
        config: of the model.
        settings: of the run.

    Raises:
        ValueError, SampleError: in a call, a sample that does not fit, which the message names.
    """

    def __init__(
        self,
        own: Callable[[list[dict[str, Any]]], dict[str, Any]],
        template: Any,
        config: PretrainedConfig,
        settings: Settings,
    ) -> None:
        self.own = own
        self.processor = template.processor  # the mixin makes idle images with it
        self.rows = SequenceRows(template.processor, config, **settings.collating)
        path = template.processor.model_info.model_dir
        self.boxes = BoxSettings.read_as(settings.boxes, settings.coord, path, prefix="")
        self._number = 0

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch with its rows.

        Args:
            samples: that the template encoded.
        """
        examples = [self._example(sample) for sample in samples]
        return self.rows(examples, self.own(samples))

    def _example(self, sample: dict[str, Any]) -> Any:
        self._number += 1
        where = f"sample {self._number} of this worker"
        if COLUMN not in sample:
            raise wrong(where, "dataset", "samples that the plugin has seen encoded", "another")
        record = json.loads(sample[COLUMN])
        where += f" ({record['messages'][-1]['content'][:60]!r})"
        if record.pop("videos"):
            raise wrong(where, "videos", "images only", "videos or sound")
        sizes, given = ([tuple(size) for size in record.pop(n)] for n in ("sizes", "given"))
        return grounded_example(with_boxes(record, sizes, where, self.boxes), sizes, given, where)


class GroundingSeq2SeqTrainer(ProgramMixin, Seq2SeqTrainer):
    """ms-swift's trainer with the settings of `register`.

    Args:
        model, args, template, kwargs: as ms-swift gives them.

    Raises:
        ValueError: options that do not go together with the losses, all by name; a model whose
            embeddings of images ms-swift makes itself.
    """

    def __init__(
        self, model: Any = None, args: Any = None, template: Any = None, **kwargs: Any
    ) -> None:
        settings = registered()
        self._refuse(model, args, template)
        args.use_logits_to_keep = False  # rows are picked from whole sequences
        checkpointing = args.gradient_checkpointing_kwargs or {}
        args.gradient_checkpointing_kwargs = {"use_reentrant": False, **checkpointing}
        attach(model, **settings.attached)
        self._grounding = base_model(model).config, settings
        super().__init__(model, args, template=template, settings=settings, **kwargs)

    def _refuse(self, model: Any, args: Any, template: Any) -> None:
        given = {"args": args, "template": template}
        problems: list[tuple[str, Any, Any]] = [
            (name, "it off", getattr(given[of], name))
            for of, names in OFF.items()
            for name in names
            if getattr(given[of], name, None)
        ]
        for name, wanted, got in (
            ("tuner_backend", "peft", args.tuner_backend),
            ("sequence_parallel_size", 1, template.sequence_parallel_size),
        ):
            if got != wanted:
                problems.append((name, wanted, got))
        if args.tuner_type == "longlora":
            problems.append(("tuner_type", "one that leaves attention as it is", "longlora"))
        if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            wanted = "use_reentrant false: the other drops the gradient of attention maps"
            problems.append(("gradient_checkpointing_kwargs", wanted, "true"))
        binary = template.is_binary_loss_scale
        if not (template.loss_scale.is_binary_loss_scale if binary is None else binary):
            problems.append(("loss_scale", "weights of 0 and 1", template._loss_scale))
        kind = type(base_model(model))
        if not kind.__module__.startswith("transformers."):
            wanted = "a class of transformers, whose forward takes images itself"
            problems.append(("model", wanted, f"{kind.__module__}.{kind.__name__}"))
        refuse(problems, "ms-swift")

    def _get_data_collator(self, args: Any, template: Any) -> GroundingBatches:
        own = super()._get_data_collator(args, template)
        return GroundingBatches(own, template, *self._grounding)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """ms-swift's, without what only its own loss reads."""
        inputs = super()._prepare_inputs(inputs)
        if ROWS in inputs:
            for name in NOT_OF_MODEL:
                inputs.pop(name, None)
        return inputs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ms-swift does; the model embeds images itself, where the template would before it.

        Args:
            args, kwargs: of ms-swift's trainer.
        """
        self.template.register_post_encode_hook = lambda models: None
        try:
            return super().train(*args, **kwargs)
        finally:
            del self.template.register_post_encode_hook
