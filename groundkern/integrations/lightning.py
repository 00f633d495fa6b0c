"""Lightning: a module that trains an attached model, exact under accumulation and over processes.

What a term is divided by is the number of its rows in the whole step. Lightning's own accumulation
(`accumulate_grad_batches`) hands over one micro-batch after the other, and takes the mean of what
each says; so here a batch of the loader is a whole step, in pieces (`StepCollator`), and the module
optimizes by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from groundkern.checks import fail, require
from groundkern.hf import Objectives, attach, doctor, objectives_of, row_counts
from groundkern.hf.data.batch import shielded
from groundkern.hf.model.doctor import LOW_PRECISION
from groundkern.hf.watching.even_ranks import ROWS
from groundkern.hf.watching.held_out import HeldOutMeans
from groundkern.hf.watching.idle_terms import IdleTerms

if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import LightningModule
else:  # two names of one package, whose classes do not know each other
    try:
        from lightning.pytorch import LightningModule
    except ImportError:
        from pytorch_lightning import LightningModule

__all__ = ["GroundingModule", "StepCollator"]

_PRECISIONS = ("32-true", "bf16-mixed")


class StepCollator:
    """Collates the samples of an optimizer step into micro-batches.

        DataLoader(samples, batch_size=8 * 4, collate_fn=StepCollator(collate, 8))

    Args:
        collate: a `GroundingCollator`.
        size: samples in a forward pass; the last piece may be smaller.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Tensor]], size: int) -> None:
        require(size > 0, "size", "a number of samples above 0", size)
        self.collate, self.size = collate, size

    def __call__(self, samples: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Make the micro-batches of a step.

        Args:
            samples: of the step, on this process.

        Returns:
            One batch for each `size` of them.
        """
        pieces = range(0, len(samples), self.size)
        return [self.collate(samples[i : i + self.size]) for i in pieces]


class GroundingModule(LightningModule):
    """Trains a transformers model with grounding losses; subclass it for anything of your own.

    A training batch is a list of micro-batches (`StepCollator`), or one batch. In each step
    `loss` and every part of it are logged, as the step's whole: over all micro-batches and
    processes. A validation has the mean of every part over all of its rows (`val_map_kl`, ...). On
    the first step with rows, `doctor` checks the wiring. A term that is 0 in each of the first
    steps is warned of.

    Args:
        model: a transformers model, bare or inside PEFT.
        optimizer: makes the optimizer of the list of parameters that train.
        objectives: attached to the model; None: it is attached already.
        schedule: makes a learning rate scheduler of the optimizer, which takes a step after each
            of the optimizer's.
        max_grad_norm: gradients are clipped to it; None: not. (Lightning's `gradient_clip_val` is
            of its automatic optimization.)
        examine: run `doctor` on the first step in which every process has rows.

    Raises:
        ValueError: an objective that the model cannot serve, or a model that is not attached; in
            training, a precision other than `32-true` and `bf16-mixed`, and batches without `gk_`
            tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        objectives: Objectives | None = None,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        max_grad_norm: float | None = 1.0,
        examine: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if objectives is not None:
            attach(model, **vars(objectives))
        objectives_of(model)
        self.model = model
        self.max_grad_norm = max_grad_norm
        self._make_optimizer, self._make_schedule = optimizer, schedule
        self._examine, self._idle = examine, IdleTerms()

    def configure_optimizers(self) -> Any:
        """The optimizer, and its scheduler if there is one."""
        optimizer = self._make_optimizer([x for x in self.parameters() if x.requires_grad])
        if self._make_schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_schedule(optimizer)}

    def on_fit_start(self) -> None:
        """Set the model to training, which Lightning leaves as it was loaded, and refuse what
        would round the batch or scale the loss.

        Raises:
            ValueError: another precision.
        """
        self.model.train()
        self._idle.done = self.trainer.global_step > 0
        if self.trainer.precision not in _PRECISIONS:
            wanted = f"{' or '.join(_PRECISIONS)} (a model loaded in bfloat16 takes 32-true)"
            fail("precision", wanted, self.trainer.precision)

    def training_step(
        self, batch: list[dict[str, Tensor]] | dict[str, Tensor], batch_idx: int
    ) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            batch: its micro-batches.
            batch_idx: not looked at.

        Returns:
            The loss of the step, over all processes, without a gradient.

        Raises:
            ValueError: a micro-batch without `gk_` tensors.
        """
        pieces = [batch] if isinstance(batch, dict) else list(batch)
        grounded = sum(ROWS in piece for piece in pieces)
        wanted = "gk_ tensors in every micro-batch, as GroundingCollator makes them"
        require(grounded == len(pieces) > 0, ROWS, wanted, f"in {grounded} of {len(pieces)}")
        totals = self._summed(torch.stack([row_counts(piece) for piece in pieces]).sum(0))
        if self._examine:
            self._examine_step(pieces[0])
        found: dict[str, Tensor] = {}
        for i, piece in enumerate(pieces):
            with self._synchronised(last=i == len(pieces) - 1):
                output = self.model(**shielded(piece), gk_totals=totals)
                # DDP and FSDP average gradients over processes; ours are shares of a sum
                self.manual_backward(output.loss * self.trainer.world_size)
            for name, part in {"loss": output.loss.detach(), **output.parts}.items():
                found[name] = found.get(name, 0.0) + part
        self._step()
        whole = self._summed(torch.stack(list(found.values())))
        found = dict(zip(found, whole.unbind(), strict=True))
        for name, part in found.items():
            self.log(name, part, batch_size=1, prog_bar=name == "loss")
        if not self._idle.done and self.trainer.is_global_zero:
            means = {name: float(part) for name, part in found.items() if name != "loss"}
            last = self.trainer.estimated_stepping_batches
            self._idle.look(means, self.trainer.global_step, last)
        return {"loss": found["loss"]}

    def on_validation_epoch_start(self) -> None:
        """Begin the means of a held-out set."""
        self._held_out: HeldOutMeans = HeldOutMeans(objectives_of(self.model), self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the means.

        Args:
            batch: of a `GroundingCollator`.
            batch_idx: not looked at.

        Raises:
            ValueError: a batch without `gk_` tensors.
        """
        require(ROWS in batch, ROWS, "gk_ tensors in a validation batch", "none")
        self._held_out.add(batch, self.model(**shielded(batch)))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all rows, of all processes."""
        several = self.trainer.world_size > 1
        gather = (lambda x: self.all_gather(x).flatten(0, 1)) if several else None
        for name, mean in self._held_out.means(gather).items():
            self.log(f"val_{name}", mean, batch_size=1)

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        return self.trainer.strategy.reduce(tensor.to(self.device), reduce_op="sum")

    def _synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged after the step's last backward only."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if last or block is None else block()

    def _step(self) -> None:
        optimizer = self.optimizers()
        if self.max_grad_norm is not None:
            how = {"gradient_clip_val": self.max_grad_norm, "gradient_clip_algorithm": "norm"}
            self.clip_gradients(optimizer, **how)
        optimizer.step()
        optimizer.zero_grad()
        if (schedule := self.lr_schedulers()) is not None:
            schedule.step()

    def _examine_step(self, piece: dict[str, Tensor]) -> None:
        """Run doctor once, where every process has rows: it has collectives of its own."""
        rows = self.all_gather(row_counts(piece)[0])
        if int(rows.min()) == 0:
            return
        self._examine = False
        low = self.trainer.precision != "32-true"
        doctor(self.model, piece, tolerance=LOW_PRECISION if low else None)
