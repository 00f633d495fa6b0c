"""Saving and loading of a trainer's checkpoints: nothing is lost, and nothing that is not finite
is written."""

from __future__ import annotations

import logging
import math

from torch import nn
from transformers import PreTrainedModel

from groundkern.checks import fail
from groundkern.hf.model.head_weight import HEAD_WEIGHT, saved_head_weight
from groundkern.hf.watching.finite import all_finite, optimizer_tensors
from groundkern.hf.watching.saved import (
    beside_adapter,
    load_beside_adapter,
    read_state,
    save_beside_adapter,
    write_state,
)

logger = logging.getLogger(__name__)


class Checkpoints:
    """The part of `GroundingMixin` that writes and reads checkpoints."""

    def may_save(self) -> bool:
        """Whether a checkpoint of this moment would be a good one.

        It asks the device. All ranks have to ask together.

        Returns:
            False if the last step was not finite, or a trained weight or the optimizer's state.
        """
        verdict = self.watch.verdict()
        if verdict.streak or verdict.reached:
            return False
        trained = [p for p in self.model.parameters() if p.requires_grad]
        trained = [getattr(p, "ds_tensor", p) for p in trained]  # ZeRO-3: this rank's share
        states = [] if self.is_deepspeed_enabled else optimizer_tensors(self.optimizer)
        finite = all_finite([*trained, *states]).to(self.args.device)
        if self.args.world_size > 1:
            finite = self.accelerator.gather(finite[None]).all()
        return bool(finite)

    def _save_checkpoint(self, model, trial) -> None:
        """Save unless what would be saved is not finite."""
        averaged_weights(self.optimizer)
        if self.may_save():
            self._write_checkpoint(model, trial)
        else:
            step = self.state.global_step
            logger.warning("no checkpoint at step %d: loss, gradient or weights not finite", step)

    def _write_checkpoint(self, model, trial) -> None:
        """Save, as the Trainer does; subclasses say where and how."""
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Save the model, and what its adapters do not hold."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir if output_dir is not None else self.args.output_dir
            save_beside_adapter(self._unwrapped(self.model), folder, state=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Also save what FSDP's adapter-only state leaves out."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled:
            write = self.args.should_save
            save_beside_adapter(self._unwrapped(self.model), output_dir, write=write)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also save the open log window."""
        super()._save_rng_state(output_dir)
        kept = self.watch.state()
        if self.args.should_save:
            write_state(output_dir, kept)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Also remember the log window that the checkpoint interrupted."""
        super()._load_scaler(checkpoint)
        self.watch.resumed = read_state(checkpoint) if checkpoint is not None else {}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load a checkpoint's weights under the names that `from_pretrained` maps them to.

        The Trainer's own loading does not rename keys and skips those it does not find: of
        Qwen2.5-VL's saved weights it would load the head and nothing else.
        """
        target = self._unwrapped(model or self.model)
        if self.is_deepspeed_enabled:  # its own format has every trained parameter
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.is_fsdp_enabled or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_beside_adapter(target, resume_from_checkpoint)
        else:
            _load_whole(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint as a resumed run would."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """As the Trainer does; without a finite value there is no best one."""
        better = super()._determine_best_metric(metrics, trial)
        if self.state.best_metric is not None and not math.isfinite(self.state.best_metric):
            self.state.best_metric = None
        return better

    def _refuse_unsaved(self) -> None:
        """Parameters that FSDP 1 flattens cannot be told apart from frozen ones.

        Raises:
            ValueError: adapters beside which something else trains, under FSDP 1.
        """
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        beside = beside_adapter(self._unwrapped(self.model))
        if getattr(plugin, "fsdp_version", 1) == 1 and beside:
            wanted = "fsdp_version: 2 where more than adapters trains"
            fail("fsdp_version", wanted, f"1, and {next(iter(beside))} trains")


def averaged_weights(optimizer: object) -> None:
    """Put the weights that count in the place of those that are trained, until the next step.

    Args:
        optimizer: one of schedulefree has both; any other is left alone.
    """
    getattr(optimizer, "eval", lambda: None)()


def _load_whole(target: nn.Module, folder: str) -> None:
    """Load a model that is saved whole."""
    weight = saved_head_weight(folder)
    learned = getattr(target, HEAD_WEIGHT, None) is not None
    if learned != bool(weight):
        wanted = "klal.head_weight as the checkpoint was trained with"
        fail("klal.head_weight", wanted, "learned" if learned else "uniform")
    saved = type(target).from_pretrained(folder, dtype=target.dtype, use_safetensors=True)
    target.load_state_dict(saved.state_dict() | weight)
