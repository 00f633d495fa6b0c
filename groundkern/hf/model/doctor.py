"""Does the wiring fit this model? Three measurements on its own batch, before any training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundkern.checks import fail
from groundkern.hf.model.attach import objectives_of
from groundkern.hf.model.request import NOT_FOR_THE_BODY, image_token_of
from groundkern.hf.model.support import base_model, refuse_unsupported, text_attention

ROWS = 4  # measured per sample
LOW_PRECISION = 0.05  # of max |logit|, in bf16 and fp16
FULL_PRECISION = 1e-5


@dataclass(frozen=True)
class DoctorReport:
    """What doctor measured, as fractions of the largest logit.

    Args:
        rows: the number of rows measured.
        main: how far the main logits with side tokens are from those of the model's own forward.
        side: how far the side logits with every key allowed are from the main logits.
        control: how far the side logits move when a row may see itself only.
        tolerance: `main` and `side` are within it, `control` is above it.
    """

    rows: int
    main: float
    side: float
    control: float
    tolerance: float


def doctor(model: nn.Module, batch: dict, *, tolerance: float | None = None) -> DoctorReport:
    """Measure on a batch that side tokens do not disturb the model and see the keys they may see.

    Runs in eval mode without gradients, and restores the mode of every module. Every rank must call
    it.

    Args:
        model: an attached model; also one wrapped in PEFT.
        batch: a batch with `gk_side_position` or `gk_text_position` rows, on the model's device.
        tolerance: as a fraction of the largest logit; None: 1e-5 for fp32 and fp64 parameters
            outside autocast, else 0.05.

    Returns:
        DoctorReport of a model that passed.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model that fails, with the reason; a model that is not attached or not
            supported; attention dropout; a batch without rows; a row that is an image token.
    """
    base = base_model(model)
    refuse_unsupported(base, objectives_of(base))
    for module in text_attention(base):
        dropout = getattr(module, "attention_dropout", 0.0)
        dropout = getattr(dropout, "p", dropout)  # Persimmon holds a module
        if dropout:
            fail("attention_dropout", "0 (set it in the model's config)", dropout)
    inputs = {
        name: x
        for name, x in batch.items()
        if not name.startswith("gk_") and name not in (*NOT_FOR_THE_BODY, "num_items_in_batch")
    }
    position = _measured_rows(base, batch)
    if tolerance is None:
        tolerance = _tolerance(base, position.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            report = _measure(model, inputs, position, tolerance)
    finally:
        for module, training in modes:
            module.training = training
    _judge(type(base).__name__, report)
    return report


def _measured_rows(model: nn.Module, batch: dict) -> Tensor:
    """[B, R] up to ROWS supervised rows of each sample."""
    empty = batch["input_ids"][:, :0]
    aligned = batch.get("gk_side_position", empty)
    trained = batch.get("gk_text_position", empty)
    position = aligned if bool((aligned >= 0).any()) else trained
    if not bool((position >= 0).any()):
        fail("batch", "rows in gk_side_position or gk_text_position", "none")
    position = position[:, :ROWS].long()
    token = batch["input_ids"].gather(1, position.clamp(min=0))
    if bool(((token == image_token_of(model)) & (position >= 0)).any()):
        fail("gk_side_position", "rows of text tokens", "a row that is an image token itself")
    return position


def _tolerance(model: nn.Module, device: torch.device) -> float:
    full = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return FULL_PRECISION if full and not torch.is_autocast_enabled(device.type) else LOW_PRECISION


def _measure(model: nn.Module, inputs: dict, position: Tensor, tolerance: float) -> DoctorReport:
    rows = position >= 0
    measured = position[rows].unique()  # the model's own logits, at these positions only
    own = _own_logits(model, inputs, measured)  # [B, K, V]
    place = torch.searchsorted(measured, position.clamp(min=0)).clamp(max=len(measured) - 1)
    own = own[torch.arange(len(own), device=own.device)[:, None], place][rows].float()
    free = model(**inputs, **_aligned_rows(position, inputs, alone=False), gk_record="logits")
    alone = model(**inputs, **_aligned_rows(position, inputs, alone=True), gk_record="logits")

    largest = own.abs().max()
    distances = (
        free.main_logits[rows] - own,
        free.side_logits[rows] - free.main_logits[rows],
        alone.side_logits[rows] - alone.main_logits[rows],
    )
    main, side, control = (float(d.abs().max() / largest) for d in distances)
    return DoctorReport(int(rows.sum()), main, side, control, tolerance)


def _own_logits(model: nn.Module, inputs: dict, measured: Tensor) -> Tensor:
    """[B, K, V]: the model's own logits at K positions; its head is not given any other.

    Not every forward has `logits_to_keep` (Qwen's Omni thinkers, VideoLLaMA3).
    """
    length = inputs["input_ids"].shape[1]

    def keep(_: nn.Module, args: tuple) -> tuple:
        whole = args[0].dim() == 3 and args[0].shape[1] == length
        return (args[0][:, measured], *args[1:]) if whole else args

    handle = base_model(model).get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return logits if logits.shape[1] == len(measured) else logits[:, measured]


def _aligned_rows(position: Tensor, inputs: dict, *, alone: bool) -> dict[str, Tensor]:
    """The `gk_` tensors of aligned rows that see every key, or only themselves."""
    batch, rows = position.shape
    length = inputs["input_ids"].shape[1]
    image = torch.zeros(batch, length, dtype=torch.int32, device=position.device)
    inside = torch.nn.functional.one_hot(position.clamp(min=0), length).bool()  # [B, R, S]
    own_set = torch.arange(rows, dtype=torch.int32, device=position.device).expand(batch, rows)
    return {
        "gk_image": image,  # every key counts as visual, so that a set may block it
        "gk_side_position": position.int(),
        "gk_side_set": own_set if alone else torch.full_like(own_set, -1),
        "gk_side_inside": inside,
    }


def _judge(name: str, report: DoctorReport) -> None:
    limit = report.tolerance
    if not report.main <= limit:
        wanted = f"{name}: main logits with side tokens within {limit} of those without"
        fail("model", wanted, f"{report.main:.2e} of the largest logit")
    if not report.side <= limit:
        wanted = f"{name}: side logits with every key allowed within {limit} of the main ones"
        fail("model", wanted, f"{report.side:.2e} of the largest logit")
    if not report.control > limit:
        wanted = f"{name}: side logits to move by more than {limit} when a row sees itself only"
        fail("model", wanted, f"{report.control:.2e} of the largest logit")
