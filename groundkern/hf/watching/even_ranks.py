"""Ranks that train together take the same steps: as many batches, the same modules in each.

Where weights are sharded every module call is a collective, and DDP waits for a gradient of every
parameter that it was not told to look for. A rank that calls fewer modules would hang the others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length

from groundkern.checks import fail, require
from groundkern.hf.data.idle_image import VIDEOS, IdleImage, has_images
from groundkern.hf.model.head_weight import HEAD_WEIGHT
from groundkern.hf.model.layers import text_decoder
from groundkern.hf.watching.context_ranks import digest

ROWS = "gk_text_position"  # a batch without it is an ordinary one
SOUNDS = "input_features"
# what is told of a micro-batch
KINDS = ("batch", "rows", "images", "videos or sounds", "digest")


class EvenRanks:
    """Gives micro-batches without images an `IdleImage` where their rank must run the tower.

    Under FSDP and DeepSpeed that is where another rank has images. Everywhere it is where the tower
    is trained and someone waits for its gradients: DDP, if it looks for no unused parameters (its
    setting, or gradient checkpointing), and DeepSpeed, which takes those of an earlier step for
    parameters that no micro-batch reached (0.19.8, ZeRO-3).

    Args:
        trainer: whose batches they are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._idle: IdleImage | None = None
        self._group: dist.ProcessGroup | None = None
        self._unseen: list[nn.Parameter] = []  # what no image of this step reaches
        self._compared = False  # token ids of ranks that share sequences

    def step(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of one optimizer step; every rank calls it.

        Args:
            batches: of this rank.

        Returns:
            The same, some with an image.

        Raises:
            ValueError: on every rank: ranks with other numbers of batches; `gk_` tensors, videos
                or sounds on some ranks only; images on some ranks only and no processor to make
                one; other batches on ranks that share sequences.
        """
        trainer, self._unseen = self._trainer, []
        if trainer.args.world_size == 1 and not trainer.is_deepspeed_enabled:
            return batches
        ranks = self._told(batches, trainer.args.gradient_accumulation_steps)
        self._refuse_uneven(ranks)
        waits = self._waited_for()
        if waits and not trainer.is_deepspeed_enabled and not bool(ranks[..., 2].any()):
            self._unseen = waits
        return self._with_images(batches, ranks, training=True, everywhere=bool(waits))

    def evaluated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of an evaluation; every rank calls it.

        Args, Returns, Raises: as `step`, of one batch.
        """
        if self._trainer.args.world_size == 1 or not self._sharded:
            return batch
        return self._with_images([batch], self._told([batch], 1), training=False)[0]

    def forget_unseen(self) -> None:
        """After the last backward of a step: parameters that DDP was given zeros for, because no
        rank had an image, have no gradient, as in one process, and no optimizer moves them."""
        for parameter in self._unseen:
            parameter.grad = None

    def as_long(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """The loader, unless it ends sooner on some ranks; every rank calls it.

        Args:
            loader: of this rank.

        Returns:
            The same.

        Raises:
            ValueError: on every rank.
        """
        trainer = self._trainer
        if trainer.args.world_size > 1:
            length = len(loader) if has_length(loader) else -1
            lengths = trainer.accelerator.gather(torch.tensor([length], device=trainer.args.device))
            wanted = "as many on every rank (accelerator_config.even_batches)"
            require(bool((lengths == lengths[0]).all()), "batches", wanted, lengths.tolist())
        return loader

    @property
    def _sharded(self) -> bool:
        return self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled

    def _told(self, batches: list[dict[str, Any]], size: int) -> torch.Tensor:
        """int [ranks, size, KINDS]: what the micro-batches of all ranks are."""
        told = torch.zeros(1, size, len(KINDS), dtype=torch.int32)
        for row, batch in zip(told[0], batches, strict=False):
            given = [name for name, x in batch.items() if x is not None]
            others = any(name.startswith((VIDEOS, SOUNDS)) for name in given)
            row[:4] = torch.tensor([1, ROWS in batch, has_images(batch), others])
        size = self._trainer.context.size
        if size == 1:
            return self._gathered(told)
        for row, batch in zip(told[0], batches, strict=False):
            on_cpu = batch["input_ids"].device.type == "cpu"
            row[4] = digest(batch, values=on_cpu or not self._compared)
        self._compared = True
        ranks = self._gathered(told)
        shared = ranks[..., 4].view(-1, size, ranks.shape[1])
        wanted = "the same batches on ranks that share sequences (a sampler with one seed for all, "
        wanted += "accelerator_config.dispatch_batches False)"
        same = bool((shared == shared[:, :1]).all())
        require(same, "train_dataset", wanted, "different ones")
        return ranks

    def _gathered(self, told: torch.Tensor) -> torch.Tensor:
        """What all ranks tell, by a group of CPUs: the device need not end its work for that."""
        ranks = self._trainer.args.world_size
        if ranks == 1:
            return told
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        found = [torch.empty_like(told) for _ in range(ranks)]
        dist.all_gather(found, told, group=self._group)
        return torch.cat(found)

    def _refuse_uneven(self, ranks: torch.Tensor) -> None:
        """Refuse what ranks have to have alike in a step, whatever they train with."""
        count = ranks[..., 0].sum(1)
        wanted = "as many batches on every rank (accelerator_config.even_batches)"
        require(bool((count == count[0]).all()), "train_dataset", wanted, count.tolist())
        wanted = "batches with gk_ tensors on every rank or on none"
        got = "a micro-batch with some on some ranks only"
        require(bool((ranks[..., 1] == ranks[:1, :, 1]).all()), ROWS, wanted, got)

    def _with_images(
        self,
        batches: list[dict[str, Any]],
        ranks: torch.Tensor,
        *,
        training: bool,
        everywhere: bool = False,
    ) -> list[dict[str, Any]]:
        """Batches with images where another rank has some and weights are sharded, or everywhere.

        Every rank makes the image if one needs it, so that an error of the processor's is told by
        all.
        """
        uneven = (ranks != ranks[:1]).any(0)  # [size, KINDS]
        if self._sharded and bool(uneven[:, 3].any()):
            wanted = "videos and sounds on every rank or on none, since weights are sharded"
            fail("batch", wanted, "a micro-batch with some on some ranks only")
        count = int(ranks[0, :, 0].sum())
        without = (ranks[:, :count, 2] == 0).any(0)  # [count], on some rank
        needed = without if everywhere else uneven[:count, 2] & torch.tensor(self._sharded)
        if not bool(needed.any()):
            return batches
        if training:
            _refuse_statistics(self._trainer.model)
        idle = self._idle_image()
        return [
            idle(batch) if need and not has_images(batch) else batch
            for batch, need in zip(batches, needed.tolist(), strict=True)
        ]

    def _waited_for(self) -> list[nn.Parameter]:
        """The trained parameters of the tower, if a step without their gradients would fail."""
        trainer, model = self._trainer, self._trainer.model_wrapped
        waits = trainer.is_deepspeed_enabled
        if isinstance(model, DistributedDataParallel):
            waits = model.static_graph or not model.find_unused_parameters
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        return tower_parameters(model) if waits else []

    def _idle_image(self) -> IdleImage:
        if self._idle is None:
            trainer = self._trainer
            model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            self._idle = IdleImage(_processor(trainer), model.config, sharded=self._sharded)
        return self._idle


def tower_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that are neither of the text decoder nor of embeddings.

    Args:
        model: a transformers model, bare or inside PEFT.

    Returns:
        Those of towers and projectors.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = (text_decoder(base), base.get_input_embeddings(), base.get_output_embeddings())
    text = {id(p) for part in parts if part is not None for p in part.parameters()}
    text.add(id(getattr(base, HEAD_WEIGHT, None)))
    return [p for p in base.parameters() if p.requires_grad and id(p) not in text]


def _refuse_statistics(model: nn.Module) -> None:
    """Refuse layers whose running statistics an image of ours would move; the Trainer puts every
    module into training mode."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            wanted = "images in every micro-batch, which move the running statistics of this layer"
            fail("pixel_values", wanted, f"a micro-batch without any, and {name!r}")


def _processor(trainer: Trainer) -> Any:
    """The model's processor, as the trainer or its collator has it."""
    collator = trainer.data_collator
    inner = getattr(collator, "collator", None)
    found = [trainer.processing_class]
    found += [getattr(each, "processor", None) for each in (collator, inner)]
    for processor in found:
        if getattr(processor, "image_processor", None) is not None:
            return processor
    wanted = "the model's processor, which makes an image for ranks that have none"
    return fail("processing_class", wanted, "none, nor a collator that has one as `processor`")
