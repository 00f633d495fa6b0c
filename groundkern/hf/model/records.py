"""The recordings that `gk_record` asks for, without gradients: maps, contributions, GradCAM and
logits of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern.checks import fail
from groundkern.hf.model.attribution import contributions, gradcam
from groundkern.hf.model.body import BodyOutput
from groundkern.hf.model.policy import policy_maps
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import take_rows, tokens_after
from groundkern.parallel.collectives import all_sum


def records_of(request: Request, body: BodyOutput) -> dict[str, Tensor]:
    """The fields of `GroundedOutput` that a request asks to record."""
    wanted, found = request.records, {}
    if "maps" in wanted:
        found["maps"] = _maps(request, body)
    if "klal" in wanted:
        found["klal_map"] = _klal_map(request, body)
    if "heads" in wanted:
        found["head_maps"] = _head_maps(request, body)
    for name in ("contributions", "gradcam"):
        if name in wanted:
            found[name] = _attribution(request, body, name)
    if "policy" in wanted:
        found["policy_maps"] = policy_maps(request, body.readings.recorded_policy)
    if "logits" in wanted:
        position, split = request.batch.side_position, request.split
        here = position if split is None else split.local(position)
        found["main_logits"] = _logits(request, take_rows(body.hidden, here))
        found["side_logits"] = _logits(request, body.side_hidden)
        if split is not None:
            for name in ("main_logits", "side_logits"):
                own = found[name].masked_fill((here < 0)[..., None], 0.0)
                found[name] = all_sum(own, split.shard)
    return found


def _maps(request: Request, body: BodyOutput) -> Tensor:
    """[B, Rm, C]: the map rows' attention, mean over layers; with "layers" [B, Rm, L, C]."""
    batch, recorded = request.batch, body.readings.recorded
    shape = (*batch.map_position.shape, request.layer_count, batch.map_columns.shape[1])
    if recorded is None:  # no rows or no visual tokens
        maps = request.denominators.new_zeros(shape)
    else:
        maps = torch.stack(recorded.maps, 1).view(shape)
    return maps if "layers" in request.records else maps.mean(2)


def _klal_map(request: Request, body: BodyOutput) -> Tensor:
    """[B, Rm, C]: the map of KLAL with `average_layers`; zeros without rows or visual tokens."""
    klal, batch = request.terms.klal, request.batch
    if klal is None or not klal.average_layers:
        fail("gk_record", "klal with average_layers for klal", "a model without")
    shape = (*batch.map_position.shape, batch.map_columns.shape[1])
    if body.readings.kl_map is None:
        return request.denominators.new_zeros(shape)
    with torch.no_grad():
        return body.readings.kl_map.mean().view(shape)


def _head_maps(request: Request, body: BodyOutput) -> Tensor:
    """[B, Rm, L, H, C]: the map rows' attention of every head, normalised over all visible keys.

    Raises:
        ValueError: layers with different numbers of heads.
    """
    batch, recorded = request.batch, body.readings.recorded_heads
    rows, columns = batch.map_position.shape, batch.map_columns.shape[1]
    if recorded is None:  # no rows or no visual tokens
        heads = request.model.config.get_text_config().num_attention_heads
        return request.denominators.new_zeros(*rows, request.layer_count, heads, columns)
    counts = [maps.shape[1] for maps in recorded.maps]
    if len(set(counts)) > 1:
        fail("gk_record", "layers of equally many heads for heads", counts)
    return torch.stack(recorded.maps, 1).unflatten(0, rows)


def _attribution(request: Request, body: BodyOutput, name: str) -> Tensor:
    """[B, Rs, C]: contributions (C1) or GradCAM of each aligned row's token on the map columns.

    Summed over layers; with "layers" [B, Rs, L, C].
    """
    position, columns = request.recorded_position, request.batch.map_columns.int()
    shape = (*position.shape, request.layer_count, columns.shape[1])
    saved, target = body.readings.saved, tokens_after(request.input_ids, position)
    if saved is None:
        maps = torch.zeros(shape, device=columns.device)
    elif name == "gradcam":
        with torch.enable_grad():
            hidden = take_rows(body.hidden, position)
            maps = gradcam(saved, hidden, target, request.head, columns)
    else:
        rows = (take_rows(body.normed, position), take_rows(body.hidden, position), target)
        normed, hidden, target = (x.flatten(0, 1) for x in rows)
        maps = contributions(request.model, saved, normed, hidden, target, columns)
        maps = maps * request.logit_rule.scale
    maps = maps.view(shape)[:, : request.batch.side_position.shape[1]]
    return maps if "layers" in request.records else maps.sum(2)


def _logits(request: Request, hidden: Tensor) -> Tensor:
    return request.logit_rule.of(request.head(hidden).detach().float())
