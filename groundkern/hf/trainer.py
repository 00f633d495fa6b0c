"""transformers' Trainer with grounding losses: exact under accumulation, every term in the logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from groundkern.checks import fail, require
from groundkern.hf.data.batch import row_counts, shielded
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.model.attach import objectives_of
from groundkern.hf.model.checkpointing import spare_frozen_parts
from groundkern.hf.model.compiled import compile_layers
from groundkern.hf.model.context import context_parallel, is_split
from groundkern.hf.model.doctor import LOW_PRECISION, doctor
from groundkern.hf.model.head_weight import train_head_weight
from groundkern.hf.model.positions import packed_inputs
from groundkern.hf.model.support import base_model
from groundkern.hf.output import GroundedOutput
from groundkern.hf.watching.checkpoints import Checkpoints
from groundkern.hf.watching.context_ranks import (
    ContextRanks,
    SharedSequences,
    beside_ddp,
    refuse_parallel,
    tell_of_context,
)
from groundkern.hf.watching.even_ranks import ROWS, EvenRanks
from groundkern.hf.watching.finite import whole
from groundkern.hf.watching.held_out import HeldOutMeans, without_repeats
from groundkern.hf.watching.plain import finite_or_none
from groundkern.hf.watching.sharding import fit_fsdp
from groundkern.hf.watching.steps import StepWatch
from groundkern.hf.watching.untouched import random_states_kept

logger = logging.getLogger(__name__)


class GroundingMixin(SharedSequences, Checkpoints):
    """What a subclass of transformers' Trainer needs to train an attached model.

        class GroundingSFTTrainer(GroundingMixin, SFTTrainer): ...

    Batches are those of `GroundingCollator`. Denominators are counted over the whole accumulated
    batch (and over all ranks), so that accumulation does not change the loss. Each log line has
    every part of the loss under its name in `GroundedOutput.parts`, averaged over the steps since
    the line before. An evaluation has the mean of every part over its rows of the whole held-out
    set (`eval_map_kl`, ...). On the first batch with rows, `doctor` checks the wiring. A batch
    without `gk_` tensors is passed on to the next class; packed rows without a cache and with the
    model's own positions, without which transformers would let their documents meet.

    A step whose gradient is not finite is not taken, so that weights never become NaN; too many in
    a row end the run, and no checkpoint is written that is not finite.

    Args:
        model: an attached model; also one wrapped in PEFT.
        args: `TrainingArguments` or what the next class expects; `torch_compile=True` compiles the
            layers of the decoder (`compile_layers`).
        rest, kwargs: as the next class expects them.
        examine: run `doctor` on the first batch that has rows.
        max_nonfinite: so many steps in a row whose loss or gradient is not finite end the run.
        term_norms_every: steps between log lines that have the norm of each term's own gradient as
            `grad_norm_map_kl`, ...; each costs a forward and a backward more. None: never.
        context_order, context_engine: with a `cp_size` above 1 in accelerate's `ParallelismConfig`,
            how sequences are split, and who computes attention (`context_parallel`). With `sp_size`
            that is DeepSpeed's Ulysses, which registers itself when training begins.

    Raises:
        DivergedError: while training, when the loss or gradients stay NaN or infinite.
        ValueError: a model that is not attached; label smoothing, `compute_loss_func`, Liger's
            fused cross entropy, DataParallel, or tensor parallelism; in training, what `EvenRanks`
            refuses, and under context parallelism batches without `gk_` tensors.
    """

    loss_is_scaled_for_ga: bool | None = True
    even_ranks: EvenRanks
    watch: StepWatch
    context: ContextRanks

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        examine: bool = True,
        max_nonfinite: int = 3,
        term_norms_every: int | None = None,
        context_order: str = "zigzag",
        context_engine: str = "gather",
        **kwargs: Any,
    ) -> None:
        refuse_parallel(getattr(args, "parallelism_config", None))
        require(max_nonfinite > 0, "max_nonfinite", "a number of steps above 0", max_nonfinite)
        if rest:
            super().__init__(model, args, *rest, **kwargs)
        else:  # by name: the next class may have other parameters first, as LLaMA-Factory's has
            super().__init__(model=model, args=args, **kwargs)
        objectives_of(self._unwrapped(self.model))
        self._refuse_unsupported()
        self.context = ContextRanks.of(self.accelerator)
        if self.context.size == 1 and is_split(self._unwrapped(self.model)):
            wanted = "one without context_parallel where parallelism_config has no cp_size"
            fail("model", wanted, "one whose sequences a group of ranks shares")
        self._split = {"order": context_order, "engine": context_engine}
        if self.context.ulysses:
            self._split = {"order": "contiguous", "engine": "ulysses"}
        context_parallel(self._unwrapped(self.model), self.context.group, **self._split)
        train_head_weight(self._unwrapped(self.model))
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            spare_frozen_parts(self._unwrapped(self.model), getattr(self.args, name, None))
        if self.args.torch_compile:
            backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
            compile_layers(self._unwrapped(self.model), backend=backend, mode=mode)
        if self.is_fsdp_enabled:
            fit_fsdp(self.accelerator.state.fsdp_plugin, self._unwrapped(self.model))
        self.args.remove_unused_columns = False
        self.args.logging_nan_inf_filter = False  # it asks the device at every micro-batch
        self.model_accepts_loss_kwargs = True
        self._examine = examine
        self._held_out: HeldOutMeans | None = None  # of the evaluation that is running
        self.even_ranks = EvenRanks(self)
        self.watch = StepWatch(self, max_nonfinite, term_norms_every)
        self.add_callback(self.watch)

    def create_accelerator_and_postprocess(self) -> None:
        """As the next class does, also with context parallelism beside DDP."""
        config = getattr(self.args, "parallelism_config", None)
        if not beside_ddp(config):
            super().create_accelerator_and_postprocess()
            return
        self.args.parallelism_config = None
        super().create_accelerator_and_postprocess()
        self.args.parallelism_config = config
        tell_of_context(self.accelerator, config)

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
        self._refuse_unsaved()
        self._refuse_other_regions()

    def _refuse_other_regions(self) -> None:
        """Refuse a collator that makes other regions than the objectives say."""
        collator = getattr(self.data_collator, "collator", self.data_collator)
        objectives = objectives_of(self._unwrapped(self.model))
        if not isinstance(collator, GroundingCollator):
            return
        wanted: dict[str, object] = {}
        if (smam := objectives.smam) is not None:
            wanted["side_control"] = smam.control
            wanted["keep_registers"] = smam.keep == "registers"
        if (klal := objectives.klal) is not None:
            wanted["map_control"] = klal.control
        for name, value in wanted.items():
            if (got := getattr(collator, name)) != value:
                fail(f"data_collator.{name}", f"{value!r}, as the objectives say", repr(got))

    def _unwrapped(self, model: nn.Module | None) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The next class's loader, as long on every rank.

        Returns:
            DataLoader.

        Raises:
            ValueError: it ends sooner on some ranks, on every rank.
        """
        return self.even_ranks.as_long(super().get_train_dataloader())

    def get_eval_dataloader(
        self, eval_dataset: str | Dataset[Any] | None = None
    ) -> DataLoader[Any]:
        """The next class's loader, as long on every rank.

        Args:
            eval_dataset: as in transformers' Trainer.

        Returns:
            DataLoader.

        Raises:
            ValueError: it ends sooner on some ranks, on every rank.
        """
        return self.even_ranks.as_long(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of one step, each with the row counts of the whole step as `gk_totals`.

        Args:
            epoch_iterator, num_batches, device: as in transformers' Trainer.

        Returns:
            The batches, and the number of trained tokens in them: the text loss's denominator.

        Raises:
            ValueError: what `EvenRanks.step` refuses; rows in some micro-batches only, which cannot
                be averaged with the others.
        """
        batches = self.even_ranks.step(list(islice(epoch_iterator, num_batches)))
        batches, items = super().get_batch_samples(iter(batches), num_batches, device)
        grounded = [ROWS in batch for batch in batches]
        if not any(grounded):
            return batches, items
        wanted = "gk_ tensors in every micro-batch of a step or in none"
        require(all(grounded), ROWS, wanted, f"some in {sum(grounded)} of {len(grounded)}")
        totals = torch.stack([row_counts(batch) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None]).sum(0) // self.context.size
        for batch in batches:
            batch["gk_totals"] = totals
        self.watch.batches = batches
        return batches, totals[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The grounded loss; in training its parts are summed for the log.

        Args:
            model, inputs, return_outputs, num_items_in_batch: as in transformers' Trainer.

        Returns:
            The loss, or (loss, GroundedOutput).
        """
        if self._examine and model.training:
            self._examine_batch(model, inputs)
        if ROWS not in inputs:
            require(
                self.context.size == 1,
                ROWS,
                "gk_ tensors in every batch, of which alone sequences are split over ranks",
                "a batch without any",
            )
            inputs = packed_inputs(base_model(self._unwrapped(model)), inputs)
            found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if model.training:
                self.watch.finite.add("loss", found[0] if return_outputs else found)
            return found
        inputs = shielded(inputs)
        if self.context.ulysses:  # the Trainer would weight the parts of a batch that was cut
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
            shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
            loss = outputs.loss * (self.args.world_size if shared else 1)
        else:
            loss, outputs = Trainer.compute_loss(
                self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training and isinstance(outputs, GroundedOutput):
            self.watch.add(outputs.parts or {})
            if not self.args.average_tokens_across_devices:  # the others' gradients are a mean
                loss = loss * self.context.size
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Within the block no ranks share sequences: each may give the model other batches.

        Returns:
            A context manager, which every rank enters and leaves.
        """
        own, self.context = self.context, ContextRanks()
        model = self._unwrapped(self.model)
        context_parallel(model, None)
        try:
            yield
        finally:
            self.context = own
            context_parallel(model, own.group, **self._split)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the next class does.

        Args:
            args, kwargs: as in transformers' Trainer.

        Returns:
            The loss for the log, a mean over ranks: those that share sequences all have the whole.
        """
        loss = super().training_step(*args, **kwargs)
        return loss / self.context.size if self.context.size > 1 else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch.

        Args:
            model, inputs, prediction_loss_only, ignore_keys: as in transformers' Trainer.

        Returns:
            (loss, None, None): there are no logits to return.
        """
        inputs = self._prepare_inputs(self.even_ranks.evaluated(self._without_repeats(inputs)))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, dict(inputs), return_outputs=True)
        if self._held_out is not None:
            if isinstance(outputs, GroundedOutput):
                self._held_out.add(inputs, outputs)
            elif "labels" in inputs:
                self._held_out.add_plain(inputs, loss)
        return loss.detach(), None, None

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without the samples by which accelerate fills the last batch up, so that ranks are even.

        It repeats the first ones; `remainder` of the samples that all ranks hold are new.
        """
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        size = len(inputs["input_ids"])
        if "attention_mask" not in inputs and "position_ids" in inputs:  # not a sample to a row
            wanted = "padded batches in an evaluation over several ranks"
            fail("data_collator", wanted, "packed rows, some of which may be repeated")
        place = self.context.of_rank(self.args.process_index)
        return without_repeats(inputs, max(0, state.remainder - place * size))

    def evaluate(
        self,
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate as transformers' Trainer does; training goes on as if it had not happened.

        Args:
            eval_dataset, ignore_keys, metric_key_prefix, kwargs: as the next class expects them.

        Returns:
            The figures, with the mean of every part over all of its rows.
        """
        kept = random_states_kept(self.args.device) if self.is_in_train else nullcontext()
        with kept:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        *rest: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """The Trainer's loop; its loss gives way to exact means if batches have `gk_` tensors.

        Args:
            dataloader, description, rest, metric_key_prefix, kwargs: as in transformers' Trainer.

        Returns:
            EvalLoopOutput.
        """
        kwargs["metric_key_prefix"] = metric_key_prefix
        objectives = objectives_of(self._unwrapped(self.model))
        held_out = self._held_out = HeldOutMeans(objectives, self.args.device)
        try:
            output = super().evaluation_loop(dataloader, description, *rest, **kwargs)
        finally:
            self._held_out = None
        gather = self.accelerator.gather if self.args.world_size > 1 else None
        if held_out.measured(gather):
            means = held_out.means(gather)
            assert output.metrics is not None
            output.metrics.update({f"{metric_key_prefix}_{k}": x for k, x in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the parts of the loss beside the training loss.

        Args:
            logs, start_time: as in transformers' Trainer.

        Raises:
            DivergedError: too many steps in a row were not finite.
        """
        verdict = None
        if "loss" in logs:
            logs.update(self.watch.logged())
            verdict = self.watch.verdict()
            if verdict.total > self.watch.told:
                logs["nonfinite_steps"] = verdict.total - self.watch.told
                self.watch.told = verdict.total
        super().log(logs, start_time)
        history = self.state.log_history
        if history:  # trainer_state.json is strict JSON
            history[-1] = finite_or_none(history[-1])
        if verdict is not None:
            self.watch.stop_if_reached(verdict)

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: float | None = None
    ) -> Tensor | float | None:
        """The norm of the whole gradient, which says whether the step may be taken."""
        self.watch.norm = whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        return self.watch.norm

    def _examine_batch(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run doctor once, on the first batch in which every rank has rows."""
        rows = [row_counts(inputs)[0] if ROWS in inputs else torch.zeros(())]
        count = torch.stack(rows).to(self.args.device)
        if int(self.accelerator.gather(count).min()) == 0:
            return
        self._examine = False
        low = self.args.bf16 or self.args.fp16
        tolerance = LOW_PRECISION if low else None
        with torch.compiler.set_stance("force_eager"):  # three calls are not worth compiling for
            report = doctor(self._unwrapped(model), inputs, tolerance=tolerance)
        logger.info("doctor: the wiring fits this model: %s", report)


class GroundingTrainer(GroundingMixin, Trainer):
    """transformers' `Trainer` for an attached model, with everything that `GroundingMixin` adds.

    Args:
        *args, **kwargs: as `transformers.Trainer`.
        examine: run `doctor` on the first batch that has rows.
    """
