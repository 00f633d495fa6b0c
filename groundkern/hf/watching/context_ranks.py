"""The ranks of a Trainer that share each sequence: context parallelism by accelerate's settings.

accelerate would cut batches itself, drop their masks, and shift labels; grounded batches are split
in the model's forward. Here it is only told which ranks take the same batches. Its `cp_size` says
how many do; `sp_size` too, and that DeepSpeed computes attention (Ulysses).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate.state import DistributedType
from torch import Tensor, nn

from groundkern.checks import require
from groundkern.parallel.agreement import number, number_of

if TYPE_CHECKING:  # what it is put in front of
    from transformers import Trainer as NextClass
else:
    NextClass = object


@dataclass(frozen=True)
class ContextRanks:
    """This rank among those that share its sequences.

    Args:
        size: how many share a sequence; they lie one behind the other.
        group: of these ranks, and of nothing else: other collectives never come between; None:
            sequences are whole.
        ulysses: DeepSpeed computes attention.
    """

    size: int = 1
    group: dist.ProcessGroup | None = None
    ulysses: bool = False

    @classmethod
    def of(cls, accelerator: Any) -> ContextRanks:
        """Those of accelerate's settings, which is kept from splitting batches itself.

        Args:
            accelerator: as the Trainer made it.

        Raises:
            ValueError: as `refuse_parallel`.
        """
        config = getattr(accelerator, "parallelism_config", None)
        refuse_parallel(config)
        size = context_size(config)
        if size == 1:
            return cls()
        accelerator._prepare_cp = lambda *prepared: prepared  # it hooks masks away
        accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader  # it cuts batches
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            _same_batches(accelerator, size)
        first = accelerator.process_index // size * size
        ranks, ulysses = list(range(first, first + size)), (getattr(config, "sp_size", 1) or 1) > 1
        if ulysses:
            _refuse_other_means(accelerator.state.deepspeed_plugin.deepspeed_config)
        return cls(size, dist.new_group(ranks, use_local_synchronization=True), ulysses)

    def of_rank(self, rank: int) -> int:
        """Which of the groups that take different batches a rank belongs to.

        Args:
            rank: of all.
        """
        return rank // self.size


def _same_batches(accelerator: Any, size: int) -> None:
    """Give ranks of one context the same batches: with DeepSpeed accelerate does so for ranks of a
    tensor parallel group alone."""
    shape = accelerator.num_processes // size, size
    mesh = dist.init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp", "tp"))
    accelerator.state.ds_device_mesh = mesh


def _refuse_other_means(settings: Mapping[str, Any]) -> None:
    """Refuse what has DeepSpeed take the mean of gradients over readers instead of all ranks."""
    zero = settings.get("zero_optimization", {})
    found = {"stage": zero.get("stage"), "reduce_scatter": zero.get("reduce_scatter", True)}
    wanted = "stage 3 with reduce_scatter beside sp_size"
    require(found == {"stage": 3, "reduce_scatter": True}, "zero_optimization", wanted, found)


def context_size(config: Any | None) -> int:
    """The ranks that share a sequence.

    Args:
        config: accelerate's `ParallelismConfig`; None: none.
    """
    return max(getattr(config, name, 1) or 1 for name in ("cp_size", "sp_size"))


def beside_ddp(config: Any | None) -> bool:
    """Whether a context is to be split where weights are not, which accelerate refuses.

    Args:
        config: accelerate's `ParallelismConfig`; None: none.
    """
    return context_size(config) > 1 and not (_uses("FSDP") or _uses("DEEPSPEED"))


def _uses(engine: str) -> bool:
    """What `accelerate launch` was told, or TrainingArguments, which tells it this way."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"


def tell_of_context(accelerator: Any, config: Any) -> None:
    """Give an accelerator that was made without them the settings that it would refuse.

    Args:
        accelerator: of DDP.
        config: accelerate's `ParallelismConfig`; its `dp_shard_size` are ranks with other batches.

    Raises:
        ValueError: sizes whose product is not the number of processes.
    """
    found = accelerator.num_processes
    wanted = f"sizes whose product is {found}, the number of processes"
    require(config.total_size == found, "parallelism_config", wanted, config.total_size)
    accelerator.state.parallelism_config = config
    accelerator.state.device_mesh = config.get_device_mesh(accelerator.device.type)


def refuse_parallel(config: Any | None) -> None:
    """Refuse what splits a layer over ranks, and what accelerate would not do.

    Args:
        config: accelerate's `ParallelismConfig`; None: none.

    Raises:
        ValueError: a tensor parallel size above 1; a sequence parallel one without DeepSpeed.
    """
    size = getattr(config, "sp_size", 1) or 1
    wanted = "1 without DeepSpeed, whose Ulysses it is (cp_size is anyone's)"
    require(size == 1 or _uses("DEEPSPEED"), "parallelism_config.sp_size", wanted, size)
    size = getattr(config, "tp_size", 1) or 1
    wanted = "1 (tensor parallelism is not supported: a layer has to be whole)"
    require(size == 1, "parallelism_config.tp_size", wanted, size)


def digest(batch: Mapping[str, Any], *, values: bool) -> int:
    """A number that ranks with the same batch have in common, and others hardly ever.

    Args:
        batch: what the collator made.
        values: look at the token ids too, not only at shapes: it waits for a device.

    Returns:
        In [0, 2^31).
    """
    shapes = [(k, tuple(x.shape)) for k, x in sorted(batch.items()) if isinstance(x, Tensor)]
    found, ids = number_of(shapes), batch.get("input_ids")
    if values and ids is not None:
        found += int(number(ids.flatten()))
    return found % 2**31


class SharedSequences(NextClass):
    """The part of `GroundingMixin` that says what ranks which share sequences take and count."""

    context: ContextRanks

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """Batches stay whole: the model's forward splits them, with what they supervise."""
        return nullcontext, inputs

    def get_sp_size(self) -> int:
        """1: of a loader's batches none is cut into more."""
        return 1

    def get_cp_size(self) -> int:
        """How many ranks share a sequence, by whichever engine."""
        return self.context.size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """This rank's share of what the Trainer counts for a batch.

        Args:
            inputs: as in transformers' Trainer.

        Returns:
            A number.
        """
        return super().floating_point_ops(inputs) // self.context.size

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of ranks that share them once."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.context.size
