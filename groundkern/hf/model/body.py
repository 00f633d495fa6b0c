"""One run of a model's body, with side tokens and everything that is read in its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from groundkern import checks
from groundkern.checks import fail, require
from groundkern.hf.model.attention import RUN
from groundkern.hf.model.attribution import final_norm
from groundkern.hf.model.body_run import BodyRun, Reading
from groundkern.hf.model.gradcam import GradcamRun, SavedLayers, gradcam_terms, refuse_sharded
from groundkern.hf.model.layer import SideRows
from groundkern.hf.model.layers import body_of
from groundkern.hf.model.mixers import refuse_passed_over
from groundkern.hf.model.own_forward import body_inputs
from groundkern.hf.model.policy import policy_reading, recorded_policy
from groundkern.hf.model.prefix import side_token_type
from groundkern.hf.model.readings import Readings, readings_of
from groundkern.hf.model.request import Request, visual_tokens_of
from groundkern.hf.model.router import router_loss
from groundkern.hf.model.rows import side_sets
from groundkern.hf.model.side_tokens import append_side_tokens
from groundkern.hf.model.sink_heads import add_sink_maps, see_last, watched
from groundkern.hf.model.sinks import SinkSideRows
from groundkern.hf.model.teacher import Lesson, distilled_reading
from groundkern.hf.model.visual_states import VisualStates

APART = "_groundkern_apart"  # in the __dict__ of a model whose masks were seen to be right


class BodyOutput(NamedTuple):
    """Last hidden states, times the logits' scale, and what was read in the layers below."""

    hidden: Tensor  # [B, S, D]
    side_hidden: Tensor  # [B, Rs, D] of the side tokens; Rs = 0 without SMAM
    readings: Readings
    normed: Tensor | None  # [B, S, D], the input of the final norm, for contributions
    gradcam: GradcamRun | None  # for GradCAM losses
    router: Tensor | None  # the auxiliary loss of a mixture of experts, if it is on
    lesson: Lesson | None = None  # of a teacher
    visual: VisualStates | None = None  # of BASIC


def run_body(request: Request, lesson: Lesson | None = None) -> BodyOutput:
    """Run the body with everything that the terms and the recordings of a request use.

    Once, unless a GradCAM loss meets side tokens: their attention differentiates once, so GradCAM
    then explains a second run without them.

    Raises:
        ValueError: GradCAM of a model with sharded weights; a model whose attention function
            was replaced after `attach`.
    """
    batch, length, split = request.batch, request.tokens_here, request.split
    inputs, side = request.inputs, None
    if request.side_tokens:
        side = _side_rows(request)
        pad = request.model.config.get_text_config().pad_token_id
        token = visual_tokens_of(request.model), side_token_type(request.model), pad
        inputs = append_side_tokens(inputs, batch.side_position, *token)
    readings = readings_of(request)
    queries = add_sink_maps(request, readings)
    readings.policy = policy_reading(request)
    readings.recorded_policy = recorded_policy(request)
    readings.distilled = distilled_reading(request, lesson)
    if "gradcam" in request.records:
        refuse_sharded(request.model)
    contributing = readings.saved is not None and "contributions" in request.records
    norm_input = _input_of(final_norm(request.model)) if contributing else nullcontext([])
    run = body_run(request, readings.all(), side)
    graph = torch.enable_grad() if "gradcam" in request.records else nullcontext()
    visual = None if request.terms.basic is None else VisualStates.of(request)
    looked = nullcontext() if visual is None else visual.watching()
    with norm_input as normed, graph, looked, watched(request.model, queries, length):
        hidden, output = _run(request, inputs, run)
        main, side_hidden = hidden[:, :length], hidden[:, length:]
        if split is not None and side is not None:
            side_hidden = split.all_side(side_hidden)
    if queries is not None:
        see_last(request.model, queries, main)
    gradcam = _gradcam_run(request, main, readings.explained) if gradcam_terms(request) else None
    router = router_loss(request, output, hidden)
    before_norm = normed[0] if normed else None
    return BodyOutput(main, side_hidden, readings, before_norm, gradcam, router, lesson, visual)


def read_body(request: Request, readings: list[Reading]) -> Tensor:
    """Last hidden states [B, S, D], times the logits' scale, of one run that readings read.

    Args:
        request: of the batch; its terms and recordings add nothing.
        readings: what is read in the layers.
    """
    return _run(request, request.inputs, body_run(request, readings))[0]


def _side_rows(request: Request) -> SideRows:
    """The aligned rows and what they may see."""
    if request.terms.smam.keep == "sinks":
        return SinkSideRows(request)
    rows = request.rows(request.batch.side_position)
    return SideRows(rows, side_sets(request.batch, request.shard), request.split)


def body_run(request: Request, readings: list[Reading], side: SideRows | None = None) -> BodyRun:
    """A run of a request's batch.

    Whether masks keep packed documents apart is looked at if that needs no sync, and otherwise in
    the first batch with several in a row.
    """
    known, documents = vars(request.model), request.documents
    guarded = documents is not None and (
        checks.values_visible(documents.new) or (APART not in known and documents.several)
    )
    whole = (request.tokens_here, request.terms.backend, readings, side, documents, guarded)
    if request.split is None:
        return BodyRun(*whole)
    return BodyRun(*whole, request.split, request.first_key)


def _gradcam_run(request: Request, hidden: Tensor, explained: SavedLayers | None) -> GradcamRun:
    """The run that was made, if it saved its layers, or one more."""
    refuse_sharded(request.model)
    if explained is None:
        explained = SavedLayers()
        hidden = read_body(request, [explained])
    return GradcamRun(hidden, explained.layers)


def _run(request: Request, inputs: dict, run: BodyRun) -> tuple[Tensor, Any]:
    """Last hidden states, times the logits' scale, and all that the body returned."""
    args, kwargs = body_inputs(request.model, {**inputs, "use_cache": False})
    with nullcontext() if run.split is None else run.split.decoder(request.model):
        output = body_of(request.model)(*args, **kwargs, **{RUN: run})
    run.finished = True
    if run.guarded and run.documents.several:  # every mask was looked at, and none refused
        vars(request.model)[APART] = True
    if run.reads and run.layers == 0:
        wanted = "the attention function that attach wrapped"
        fail("attn_implementation", wanted, "one that was set afterwards: attach again")
    refuse_passed_over(request.model, run)
    hidden, scale = output[0], request.logit_rule.scale
    wanted, got = inputs["input_ids"].shape[1], hidden.shape[1]
    if run.split is not None:
        wanted = run.split.index.shape[1]
    require(got == wanted, "model", f"a hidden state for each of {wanted} tokens", got)
    return (hidden if scale == 1.0 else hidden * scale), output


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the first argument of every call of a module within the block."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()
