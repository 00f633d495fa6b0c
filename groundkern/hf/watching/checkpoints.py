"""Saving and loading of a trainer's checkpoints: nothing is lost, and nothing that is not finite
is written."""

from __future__ import annotations

import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from groundkern.checks import fail
from groundkern.hf.model.head_weight import HEAD_WEIGHT, saved_head_weight
from groundkern.hf.watching import formats, zero
from groundkern.hf.watching.finite import all_finite, inner_optimizer, optimizer_tensors
from groundkern.hf.watching.saved import (
    beside_adapter,
    load_beside_adapter,
    read_state,
    save_beside_adapter,
    write_state,
)

if TYPE_CHECKING:  # what it is put in front of
    from transformers import Trainer as NextClass
else:
    NextClass = object

logger = logging.getLogger(__name__)


class Checkpoints(NextClass):
    """The part of `GroundingMixin` that writes and reads checkpoints."""

    _groups: (
        tuple[()] | list[dict[str, Any]]
    ) = ()  # settings of the optimizer's groups; none if DeepSpeed made it

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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save unless what would be saved is not finite."""
        averaged_weights(self.optimizer)
        if self.may_save():
            self._write_checkpoint(model, trial)
        else:
            step = self.state.global_step
            logger.warning("no checkpoint at step %d: loss, gradient or weights not finite", step)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, as the Trainer does; subclasses say where and how."""
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `from_pretrained` reads it, whatever the checkpoints are like.

        Args:
            output_dir, _internal_call: as in transformers' Trainer.
        """
        folder = output_dir if output_dir is not None else self.args.output_dir
        if self.is_deepspeed_enabled and self.deepspeed is None:  # nothing was trained
            self._save(folder)
            return
        if self._shards() and not _internal_call:  # the Trainer would write nothing
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _shards(self) -> bool:
        """Whether FSDP's checkpoints are in shards."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return "SHARDED" in str(getattr(plugin, "state_dict_type", ""))

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
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

    def _form(self) -> formats.Form:
        if self.is_deepspeed_enabled:
            return "DeepSpeed"
        return "FSDP" if self.is_fsdp_enabled else "whole"

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as transformers' Trainer does, also on from a checkpoint of other ranks.

        Args:
            resume_from_checkpoint, rest, kwargs: as in the next class.

        Returns:
            TrainOutput.

        Raises:
            ValueError: a checkpoint that this run cannot continue.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if not folder:
            return super().train(resume_from_checkpoint, *rest, **kwargs)
        formats.refuse_other_form(folder, self._form())
        if not self.is_deepspeed_enabled or zero.ranks_of(folder) == self.args.world_size:
            return super().train(resume_from_checkpoint, *rest, **kwargs)
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin.zero_stage != 3:
            wanted = f"{zero.ranks_of(folder)} ranks, which saved it, or zero_stage: 3"
            fail("resume_from_checkpoint", wanted, f"{self.args.world_size}")
        with self._converted(folder) as made:
            zero.load_universal(plugin, on=True)
            try:
                return super().train(str(made), *rest, **kwargs)
            finally:
                zero.load_universal(plugin, on=False)

    @contextmanager
    def _converted(self, folder: str | os.PathLike[str]) -> Iterator[Path]:
        """DeepSpeed's universal form of a checkpoint, made by the first rank; removed at the end.

        Raises:
            ValueError: on every rank, if it cannot be converted.
        """
        made = Path(self.args.output_dir, f"{Path(folder).name}-universal")
        first, said = self.args.process_index == 0, [None]
        if first:
            try:
                zero.convert(folder, made)
            except ValueError as error:
                said = [error]
        if self.args.world_size > 1:
            dist.broadcast_object_list(said)
        if said[0] is not None:
            raise said[0]
        try:
            yield made
        finally:
            if first:
                shutil.rmtree(made, ignore_errors=True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer does; the groups' settings are remembered for ZeRO.

        Args:
            args, kwargs: as in the next class.

        Returns:
            The optimizer.
        """
        made = super().create_optimizer(*args, **kwargs)
        varied = ("params", "lr", "initial_lr")
        self._groups = [
            {name: x for name, x in group.items() if name not in varied}
            for group in inner_optimizer(self.optimizer).param_groups
            if any(p.requires_grad for p in group["params"])  # DeepSpeed drops the others
        ]
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also of a checkpoint that FSDP or DeepSpeed wrote, into an optimizer that is whole."""
        own, saved = self._form(), formats.form_of(checkpoint) if checkpoint else None
        if saved in (None, own):
            super()._load_optimizer_and_scheduler(checkpoint)
            if own == "DeepSpeed" and self.deepspeed.load_universal_checkpoint():
                zero.mend(self.deepspeed, self._groups)
            return
        optimizer = inner_optimizer(self.optimizer)
        if saved == "FSDP":
            formats.load_fsdp_optimizer(self.model, optimizer, checkpoint)
        else:
            with self._converted(checkpoint) as made:
                zero.load_optimizer(self.model, optimizer, made)
                self.accelerator.wait_for_everyone()
        with warnings.catch_warnings():  # that the optimizer has to be loaded too
            warnings.simplefilter("ignore")
            state = torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True)
            if saved == "DeepSpeed":  # it drops groups in which nothing trains
                own = self.lr_scheduler.state_dict()
                state |= {k: own[k] for k in ("base_lrs", "lr_lambdas") if k in own}
            self.lr_scheduler.load_state_dict(state)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load a checkpoint's weights under the names that `from_pretrained` maps them to.

        The Trainer's own loading does not rename keys and skips those it does not find: of
        Qwen2.5-VL's saved weights it would load the head and nothing else.
        """
        folder, own = resume_from_checkpoint, self._form()
        target = self._unwrapped(model or self.model)
        formats.refuse_other_form(folder, own)
        if own == "DeepSpeed":
            first = self.args.process_index == 0
            zero.put(target, folder, first=first)
        elif own == "FSDP":
            super()._load_from_checkpoint(folder, model)
            load_beside_adapter(target, folder)
        elif formats.form_of(folder) != own:
            formats.load_weights(target, folder)
        elif isinstance(target, PreTrainedModel):
            _load_whole(target, folder)
        else:
            super()._load_from_checkpoint(folder, model)
            load_beside_adapter(target, folder)

    def _load_best_model(self) -> None:
        """Load the best checkpoint as a resumed run would."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
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
