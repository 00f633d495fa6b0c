"""Does the wiring fit this model? A few measurements on its own batch, before any training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groundkern.checks import fail, require
from groundkern.hf.data.image_token import one_of
from groundkern.hf.model.attach import objectives_of
from groundkern.hf.model.comparing import compared_attention, few_logits, last_hidden
from groundkern.hf.model.documents import Documents
from groundkern.hf.model.layer import SideRows
from groundkern.hf.model.layers import text_attention
from groundkern.hf.model.logit_rule import logit_rule
from groundkern.hf.model.modes import modes_kept
from groundkern.hf.model.request import (
    NOT_FOR_THE_BODY,
    Request,
    visual_tokens_of,
    with_documents,
)
from groundkern.hf.model.rows import side_sets
from groundkern.hf.model.support import (
    FAILED,
    base_model,
    refuse_unsupported,
    supported_objectives,
)

ROWS = 4  # measured per sample
LOW_PRECISION = 0.05  # of max |logit|, in bf16 and fp16
FULL_PRECISION = 1e-5


@dataclass(frozen=True)
class DoctorReport:
    """What doctor measured, as fractions of the largest logit.

    On a model that does not support SMAM there are no side tokens: `side` and `control` are then
    of the ops' attention, in the layer where it is worst, as fractions of that layer's largest
    output; None if the ops compute no layer's attention.

    Args:
        rows: the number of rows measured.
        main: how far the main logits with side tokens are from those of the model's own forward.
        side: how far the side logits with every key allowed are from the main logits.
        control: how far the side logits move when a row may see itself only.
        tolerance: `main` and `side` are within it, `control` is above it.
        of: "side tokens", "attention" or "logits": what was measured.
        packed: of packed rows, how far last hidden states are from those of every document alone,
            as a fraction of the largest; None: the batch has a document to a row.
    """

    rows: int
    main: float
    side: float | None
    control: float | None
    tolerance: float
    of: str = "side tokens"
    packed: float | None = None


def doctor(
    model: nn.Module, batch: dict[str, Any], *, tolerance: float | None = None
) -> DoctorReport:
    """Measure on a batch that side tokens do not disturb the model and see the keys they may see.

    A model that does not support SMAM has no side tokens: then the ops' attention of the rows is
    compared with the model's own in every layer that maps are read from. So it is if SMAM is not
    attached and side tokens fail here, and evaluation leaves SMAM out from then on.

    On packed rows the model's own forward also runs each document alone. A model that fails this is
    refused packed rows from then on.

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
    objectives = objectives_of(base)
    failed = base.__dict__.setdefault(FAILED, {})
    failed.pop("smam", None)
    if batch.get("attention_mask") is None:
        failed.pop("packing", None)
    refuse_unsupported(base, objectives)
    for module in text_attention(base).values() if objectives.read_attention else ():
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
    inputs, documents = with_documents(base, inputs)
    with modes_kept(model), torch.no_grad():
        model.eval()
        packed = None
        if documents is not None:
            packed = _off_alone(model, inputs, documents)
            _judge_packed(base, packed, tolerance)
        report = _examined(model, inputs, position, tolerance)
        return replace(report, packed=packed)


def _measured_rows(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """[B, R] up to ROWS supervised rows of each sample."""
    empty = batch["input_ids"][:, :0]
    aligned = batch.get("gk_side_position", empty)
    trained = batch.get("gk_text_position", empty)
    position = aligned if bool((aligned >= 0).any()) else trained
    if not bool((position >= 0).any()):
        fail("batch", "rows in gk_side_position or gk_text_position", "none")
    position = position[:, :ROWS].long()
    token = batch["input_ids"].gather(1, position.clamp(min=0))
    if bool((one_of(token, visual_tokens_of(model)) & (position >= 0)).any()):
        fail("gk_side_position", "rows of text tokens", "a row that is an image token itself")
    return position


def _tolerance(model: nn.Module, device: torch.device) -> float:
    full = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return FULL_PRECISION if full and not torch.is_autocast_enabled(device.type) else LOW_PRECISION


def _examined(
    model: nn.Module, inputs: dict[str, Any], position: Tensor, tolerance: float
) -> DoctorReport:
    """The report of a model that passed, with side tokens if it supports them.

    Raises:
        ValueError: it fails.
    """
    base = base_model(model)
    name, objectives = type(base).__name__, objectives_of(base)
    if supported_objectives(base)["smam"] is None:
        try:
            report = _measure(model, inputs, position, tolerance)
            _judge(name, report)
            return report
        except ValueError as error:
            if objectives.smam is not None:
                raise
            base.__dict__.setdefault(FAILED, {})["smam"] = str(error)
    report = _measure(model, inputs, position, tolerance)
    alone = {**inputs, **_aligned_rows(position, inputs, alone=True)}
    request = Request.of(base, objectives, alone)
    every = SideRows(request.rows(request.batch.side_position), None)
    some = side_sets(request.batch)
    compared = compared_attention(model, inputs, every, some, objectives.backend)
    if compared.off:
        side, control = max(compared.off), max(compared.moved)
        report = replace(report, side=side, control=control, of="attention")
    _judge(name, report)
    return report


def _measure(
    model: nn.Module, inputs: dict[str, Any], position: Tensor, tolerance: float
) -> DoctorReport:
    """Logits of the rows; without side tokens there are no side logits."""
    rows = position >= 0
    measured = position[rows].unique()  # the model's own logits, at these positions only
    own = _own_logits(model, inputs, measured)  # [B, K, V]
    place = torch.searchsorted(measured, position.clamp(min=0)).clamp(max=len(measured) - 1)
    own = own[torch.arange(len(own), device=own.device)[:, None], place][rows].float()
    kept: slice | Tensor = slice(None)
    offset = logit_rule(base_model(model)).offset
    if offset is not None:  # ids that are left out have no logit to compare
        counted = kept = (offset == 0).to(own.device)
        own = own[:, counted[: own.shape[1]]]
    free = model(**inputs, **_aligned_rows(position, inputs, alone=False), gk_record="logits")
    largest = own.abs().max()
    main = float((free.main_logits[rows][:, kept] - own).abs().max() / largest)
    count = int(rows.sum())
    if free.side_log_prob is None:
        return DoctorReport(count, main, None, None, tolerance, "logits")
    alone = model(**inputs, **_aligned_rows(position, inputs, alone=True), gk_record="logits")
    moved = ((x.side_logits - x.main_logits)[rows][:, kept] for x in (free, alone))
    side, control = (float(d.abs().max() / largest) for d in moved)
    return DoctorReport(count, main, side, control, tolerance)


def _off_alone(model: nn.Module, inputs: dict[str, Any], documents: Documents) -> float:
    """How far last hidden states of packed rows are from those of each document alone."""
    packed = last_hidden(model, inputs)
    alone = documents.pack(last_hidden(model, documents.alone(inputs)))
    return float((packed - alone).abs().max() / alone.abs().max())


def _judge_packed(model: nn.Module, off: float, tolerance: float) -> None:
    name = type(model).__name__
    wanted = (
        f"{name}: hidden states of documents in a row within {tolerance} of those of each alone"
    )
    try:
        require(off <= tolerance, "packing", wanted, f"{off:.2e} of the largest")
    except ValueError as error:
        model.__dict__.setdefault(FAILED, {})["packing"] = str(error)
        raise


def _own_logits(model: nn.Module, inputs: dict[str, Any], measured: Tensor) -> Tensor:
    """[B, K, V]: the model's own logits at K positions."""
    with few_logits(model, inputs["input_ids"].shape[1], measured):
        logits = model(**inputs, use_cache=False).logits  # a cache makes packed rows one
    return logits if logits.shape[1] == len(measured) else logits[:, measured]


def _aligned_rows(position: Tensor, inputs: dict[str, Any], *, alone: bool) -> dict[str, Tensor]:
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
    logits, own, moved = "main logits with side tokens", "side logits", "the main ones"
    unit = "of the largest logit"
    if report.of != "side tokens":
        logits = "logits of the grounded forward"
        own, moved = "attention of rows by the ops", "the model's own"
        unit = "of the largest output"
    if not report.main <= limit:
        wanted = f"{name}: {logits} within {limit} of the model's own"
        fail("model", wanted, f"{report.main:.2e} of the largest logit")
    if report.side is None:
        return
    if not report.side <= limit:
        wanted = f"{name}: {own} with every key allowed within {limit} of {moved}"
        fail("model", wanted, f"{report.side:.2e} {unit}")
    if report.control is not None and not report.control > limit:
        wanted = f"{name}: {own} to move by more than {limit} when a row sees itself only"
        fail("model", wanted, f"{report.control:.2e} {unit}")
