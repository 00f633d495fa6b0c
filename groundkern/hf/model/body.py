"""One run of a model's body with side tokens and map readings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern.checks import fail
from groundkern.hf.model.attention import RECORD, Kept, Record, SideRows
from groundkern.hf.model.attribution import contributions, final_norm, gradcam
from groundkern.hf.model.gradcam import Explained, gradcam_terms
from groundkern.hf.model.readings import Readings, readings_of
from groundkern.hf.model.request import Call, image_token_of
from groundkern.hf.model.side_tokens import append_side_tokens
from groundkern.hf.supervision import side_sets, take_rows, tokens_after


class BodyOutput(NamedTuple):
    """What the body left: hidden states times the logits' scale, and what its layers summed up."""

    hidden: Tensor  # [B, S, D]
    side_hidden: Tensor  # [B, Rs, D] of the side tokens; Rs = 0 without SMAM
    readings: Readings
    explained: Explained | None  # of this run, for GradCAM losses
    kept: Kept | None
    normed: Tensor | None  # [B, S, D], the input of the final norm


def run_body(call: Call) -> BodyOutput:
    """Run the body once, with everything that the terms and the records ask of its layers."""
    s, inputs, length = call.s, call.inputs, call.input_ids.shape[1]
    record = Record(length, call.terms.backend)
    if call.terms.smam is not None and s.side_position.shape[1]:
        record.side = SideRows(call.rows(s.side_position), side_sets(s))
        inputs = append_side_tokens(inputs, s.side_position, image_token_of(call.model))
    readings = readings_of(call)
    record.readings = readings.all()
    if gradcam_terms(call) and record.side is None:
        record.explained = Explained()
    if call.records & {"contributions", "gradcam"} and s.side_position.shape[1]:
        record.kept = Kept(call.rows(s.side_position))
    contributing = record.kept is not None and "contributions" in call.records
    norm_input = _input_of(final_norm(call.model)) if contributing else nullcontext([])
    graph = torch.enable_grad() if "gradcam" in call.records else nullcontext()
    with norm_input as normed, graph:
        hidden = _last_hidden(call, inputs, record)
        main, side = hidden[:, :length], hidden[:, length:]
    normed = normed[0] if normed else None
    return BodyOutput(main, side, readings, record.explained, record.kept, normed)


def attribute(call: Call, body: BodyOutput, what: str) -> Tensor:
    """Contributions (C1) or GradCAM of each aligned row's token on the map columns.

    Args:
        what: "contributions" or "gradcam".

    Returns:
        [B, Rs, C] fp32, or [B, Rs, L, C] where the layers are recorded.
    """
    position, columns = call.s.side_position, call.s.map_columns.int()
    shape = (*position.shape, call.layer_count, columns.shape[1])
    if body.kept is None:
        maps = torch.zeros(shape, device=columns.device)
    else:
        target = tokens_after(call.input_ids, position)
        with torch.enable_grad() if what == "gradcam" else nullcontext():
            hidden = take_rows(body.hidden, position)
            if what == "gradcam":
                maps = gradcam(body.kept, hidden, target, call.head, columns)
            else:
                rows = (take_rows(body.normed, position), hidden)
                flat = (x.flatten(0, 1) for x in (*rows, target))
                maps = contributions(call.model, body.kept, *flat, columns) * call.logit_scale
    maps = maps.view(shape)
    return maps if "layers" in call.records else maps.sum(2)


def explained_run(call: Call, body: BodyOutput) -> tuple[Tensor, Explained]:
    """Last hidden states [B, S, D] and the layers that made them, for GradCAM.

    The first run itself where it had no side tokens; their attention differentiates once, so
    otherwise a second run without them.
    """
    if body.explained is not None:
        return body.hidden, body.explained
    record = Record(call.input_ids.shape[1], call.terms.backend)
    record.explained = Explained()
    return _last_hidden(call, call.inputs, record), record.explained


def _last_hidden(call: Call, inputs: dict, record: Record) -> Tensor:
    hidden = call.model.base_model(**inputs, use_cache=False, **{RECORD: record})[0]
    hidden = hidden if call.logit_scale == 1.0 else hidden * call.logit_scale
    record.open = False
    if record.calls == 0:
        wanted = "the attention function that attach wrapped"
        fail("attn_implementation", wanted, "one that was set afterwards: attach again")
    return hidden


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives what goes into a module within the block."""
    kept: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        yield kept
    finally:
        hook.remove()
