"""One run of a model's body with side tokens and map readings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern.checks import fail
from groundkern.hf.attention import RECORD, Contributions, Record, SideRows
from groundkern.hf.call import Call, image_token_of
from groundkern.hf.gradcam import Explained, gradcam_terms
from groundkern.hf.head import unembedding
from groundkern.hf.readings import Readings, readings_of
from groundkern.hf.side_tokens import append_side_tokens
from groundkern.hf.supervision import side_sets, take_rows, tokens_after


class BodyOutput(NamedTuple):
    """What the body left: hidden states, and what its layers summed up."""

    hidden: Tensor  # [B, S, D]
    side_hidden: Tensor  # [B, Rs, D] of the side tokens; Rs = 0 without SMAM
    readings: Readings
    explained: Explained | None  # of this run, for GradCAM
    normed: Tensor | None  # [B, S, D], the input of the final norm


def run_body(call: Call) -> BodyOutput:
    """Run the body once, with everything that the terms and the mode ask of its layers."""
    s, inputs, length = call.s, call.inputs, call.input_ids.shape[1]
    record = Record(length, call.terms.backend)
    if call.terms.smam is not None and s.side_position.shape[1]:
        record.side = SideRows(call.rows(s.side_position), side_sets(s))
        inputs = append_side_tokens(inputs, s.side_position, image_token_of(call.model))
    readings = readings_of(call)
    record.readings = readings.all()
    if gradcam_terms(call) and record.side is None:
        record.explained = Explained()
    norm_input = _input_of(_norm(call.model)) if call.mode == "contributions" else nullcontext([])
    with norm_input as normed:
        hidden = _last_hidden(call.model, inputs, record)
    main, side = hidden[:, :length], hidden[:, length:]
    return BodyOutput(main, side, readings, record.explained, normed[0] if normed else None)


def contributions(call: Call, first: BodyOutput) -> Tensor:
    """(C1) of each aligned row's token on the map columns: a second run, along g of the first.

    Returns:
        [B, Rs, C] fp32: `sum over layers and heads of A * (v . W_O^T (u_w * norm_weight /
        RMS(x^L)))`.
    """
    s, norm = call.s, _norm(call.model)
    x = take_rows(first.normed, s.side_position).flatten(0, 1).float()  # [N, D]
    rms = x.square().mean(-1, keepdim=True).add(norm.variance_epsilon).sqrt()
    rows = take_rows(first.hidden, s.side_position).flatten(0, 1)
    target = tokens_after(call.input_ids, s.side_position).flatten()
    u = unembedding(call.head, rows, target)
    direction = (u * norm.weight / rms).to(rows.dtype)  # [N, D]
    reading = Contributions(call.rows(s.side_position), s.map_columns.int(), direction)
    record = Record(call.input_ids.shape[1], call.terms.backend)
    record.readings.append(reading)
    with torch.no_grad():
        _last_hidden(call.model, call.inputs, record)
    return reading.total.view(*s.side_position.shape, s.map_columns.shape[1])


def explained_run(call: Call, body: BodyOutput) -> tuple[Tensor, Explained]:
    """Last hidden states [B, S, D] and the layers that made them, for GradCAM.

    The first run itself where it had no side tokens; their attention differentiates once, so
    otherwise a second run without them.
    """
    if body.explained is not None:
        return body.hidden, body.explained
    record = Record(call.input_ids.shape[1], call.terms.backend)
    record.explained = Explained()
    return _last_hidden(call.model, call.inputs, record), record.explained


def _last_hidden(model: nn.Module, inputs: dict, record: Record) -> Tensor:
    hidden = model.base_model(**inputs, use_cache=False, **{RECORD: record})[0]
    record.open = False
    if record.calls == 0:
        wanted = "the attention function that attach wrapped"
        fail("attn_implementation", wanted, "one that was set afterwards: attach again")
    return hidden


def _norm(model: nn.Module) -> nn.Module:
    norm = getattr(model.get_decoder(), "norm", None)
    if not hasattr(norm, "variance_epsilon"):
        fail("gk_record", "a final RMSNorm for contributions", type(norm).__name__)
    return norm


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives what goes into a module within the block."""
    kept: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        yield kept
    finally:
        hook.remove()
