"""transformers' Trainer with grounding losses: exact under accumulation, every term in the logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from groundkern.checks import fail, require
from groundkern.hf.data.batch import row_counts
from groundkern.hf.model.attach import objectives_of
from groundkern.hf.model.doctor import LOW_PRECISION, doctor
from groundkern.hf.model.head_weight import saved_head_weight
from groundkern.hf.output import GroundedOutput

logger = logging.getLogger(__name__)

ROWS = "gk_text_position"  # a batch without it is an ordinary one


class GroundingMixin:
    """What a subclass of transformers' Trainer needs to train an attached model.

        class GroundingSFTTrainer(GroundingMixin, SFTTrainer): ...

    Batches are those of `GroundingCollator`. Denominators are counted over the whole accumulated
    batch (and over all ranks), so that accumulation does not change the loss. Each log line has
    every part of the loss under its name in `GroundedOutput.parts`, averaged over the steps since
    the line before. On the first batch with rows, `doctor` checks the wiring. A batch without `gk_`
    tensors is passed on to the next class.

    Args:
        model: an attached model; also one wrapped in PEFT.
        args: `TrainingArguments` or what the next class expects.
        rest, kwargs: as the next class expects them.
        examine: run `doctor` on the first batch that has rows.

    Raises:
        ValueError: a model that is not attached; label smoothing, `compute_loss_func`, Liger's
            fused cross entropy, DataParallel, or context, sequence or tensor parallelism; in
            training, images on some ranks only while weights are sharded.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model=None, args=None, *rest, examine: bool = True, **kwargs) -> None:
        refuse_parallel(getattr(args, "parallelism_config", None))
        super().__init__(model, args, *rest, **kwargs)
        objectives_of(self._unwrapped(self.model))
        self._refuse_unsupported()
        self.args.remove_unused_columns = False
        self.model_accepts_loss_kwargs = True
        self._examine = examine
        self._parts: dict[str, Tensor] = {}
        self._parts_since = 0  # the step at which the sums in _parts began

    def _refuse_unsupported(self) -> None:
        args = self.args
        if args.label_smoothing_factor:
            wanted = "0 (the text loss is not smoothed)"
            fail("label_smoothing_factor", wanted, args.label_smoothing_factor)
        if self.compute_loss_func is not None:
            fail("compute_loss_func", "None (the losses are the attached ones)", "a function")
        liger = args.liger_kernel_config or {}
        if args.use_liger_kernel and liger.get("fused_linear_cross_entropy", True):
            wanted = "{'fused_linear_cross_entropy': False}, since Liger's replaces the forward"
            fail("liger_kernel_config", wanted, args.liger_kernel_config)
        if args.n_gpu > 1:
            wanted = "one process per GPU (torchrun or accelerate launch)"
            fail("n_gpu", wanted, f"DataParallel over {args.n_gpu}")
        refuse_parallel(getattr(self.accelerator, "parallelism_config", None))

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one step, each with the row counts of the whole step as `gk_totals`.

        Args:
            epoch_iterator, num_batches, device: as in transformers' Trainer.

        Returns:
            The batches, and the number of trained tokens in them: the text loss's denominator.

        Raises:
            ValueError: images on some ranks only while weights are sharded.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or any(ROWS not in batch for batch in batches):
            return batches, items
        self._refuse_uneven_images(batches)
        totals = torch.stack([row_counts(batch) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None]).sum(0)
        for batch in batches:
            batch["gk_totals"] = totals
        return batches, totals[0]

    def _refuse_uneven_images(self, batches: list[dict]) -> None:
        """Every rank must call the same modules when their calls gather sharded weights."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return
        held = torch.tensor([any(map(_is_pixels, b)) for b in batches], device=self.args.device)
        ranks = self.accelerator.gather(held[None].int())
        if bool((ranks != ranks[:1]).any()):
            wanted = "images on every rank or on none, since sharded weights are gathered by all"
            fail("pixel_values", wanted, "a micro-batch with images on some ranks only")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The grounded loss; in training its parts are summed for the log.

        Args:
            model, inputs, return_outputs, num_items_in_batch: as in transformers' Trainer.

        Returns:
            The loss, or (loss, GroundedOutput).
        """
        if self._examine and model.training:
            self._examine_batch(model, inputs)
        if ROWS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = Trainer.compute_loss(
            self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training and isinstance(outputs, GroundedOutput):
            if not self._parts:
                self._parts_since = self.state.global_step
            for name, part in outputs.parts.items():
                self._parts[name] = self._parts.get(name, 0.0) + part
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch.

        Args:
            model, inputs, prediction_loss_only, ignore_keys: as in transformers' Trainer.

        Returns:
            (loss, None, None): there are no logits to return.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the parts of the loss beside the training loss.

        Args:
            logs, start_time: as in transformers' Trainer.
        """
        if "loss" in logs and self._parts:
            logs.update(self._mean_parts())
        super().log(logs, start_time)

    def _mean_parts(self) -> dict[str, float]:
        """The mean of each part over the steps since the last log: one reduction, one sync."""
        names = sorted(self._parts)
        values = torch.stack([self._parts[name] for name in names])
        if self.args.world_size > 1:  # each rank has its share of the global mean, or its own mean
            ranks = self.accelerator.gather(values[None])
            values = ranks.sum(0) if self.args.average_tokens_across_devices else ranks.mean(0)
        values = values / max(1, self.state.global_step - self._parts_since)
        self._parts = {}
        return dict(zip(names, values.tolist(), strict=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load a checkpoint's weights under the names that `from_pretrained` maps them to.

        The Trainer's own loading does not rename keys and skips those it does not find: of
        Qwen2.5-VL's saved weights it would load the head and nothing else.
        """
        target = self._unwrapped(model or self.model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not isinstance(target, PreTrainedModel):  # adapters load as PEFT loads them
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(
            resume_from_checkpoint, dtype=target.dtype, use_safetensors=True
        )
        target.load_state_dict(saved.state_dict() | saved_head_weight(resume_from_checkpoint))

    def _examine_batch(self, model: nn.Module, inputs: dict) -> None:
        """Run doctor once, on the first batch in which every rank has rows."""
        rows = [row_counts(inputs)[0] if ROWS in inputs else torch.zeros(())]
        count = torch.stack(rows).to(self.args.device)
        if int(self.accelerator.gather(count).min()) == 0:
            return
        self._examine = False
        low = self.args.bf16 or self.args.fp16
        report = doctor(self._unwrapped(model), inputs, tolerance=LOW_PRECISION if low else None)
        logger.info("doctor: the wiring fits this model: %s", report)


class GroundingTrainer(GroundingMixin, Trainer):
    """transformers' `Trainer` for an attached model, with everything that `GroundingMixin` adds.

    Args:
        *args, **kwargs: as `transformers.Trainer`.
        examine: run `doctor` on the first batch that has rows.
    """


def refuse_parallel(config: object | None) -> None:
    """Refuse what splits a sequence or a layer over ranks: a row and its keys must be on one rank.

    Args:
        config: accelerate's `ParallelismConfig`; None: none.

    Raises:
        ValueError: a context, sequence or tensor parallel size above 1.
    """
    for name in ("cp_size", "sp_size", "tp_size"):
        size = getattr(config, name, 1) or 1
        wanted = "1 (context, sequence and tensor parallelism are not supported yet)"
        require(size == 1, f"parallelism_config.{name}", wanted, size)


def _is_pixels(name: str) -> bool:
    return name.startswith("pixel_values")
