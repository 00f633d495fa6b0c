"""What each key contributes to an answer token's logit: (C1) and GradCAM, layer by layer.

Both are computed at the end of the one run of the body, from what `SavedAttention` saved of every
layer. With every key as a column,

    logit = sum over layers and keys of (C1) + d . (x^0 + every FFN's output) + biases

where d is the logit's gradient at the last residual stream with the norms' statistics held, so that
post-norms, output projections and adapters are part of g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern import attention_contribution
from groundkern.checks import fail
from groundkern.hf.model.attention import LAYER
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.head import unembedding
from groundkern.hf.model.layer import Layer
from groundkern.hf.model.layers import forward_source, text_decoder
from groundkern.hf.model.rows import Rows
from groundkern.hf.model.sharded import gathered
from groundkern.selection import QueryRows

FINAL_NORMS = ("norm", "embedding_norm", "norm_f")
# A norm between an attention's output and the residual stream, and what tells that it is there.
POST_NORMS = (
    ("post_self_attn_layernorm", "post_self_attn_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
)


class SavedLayer(NamedTuple):
    """One layer's attention of N rows."""

    module: nn.Module
    q: Tensor  # [N, Hq, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    out: Tensor  # [N, Hq, Dv]
    full_out: Tensor  # [B, S, Hq, Dv], in the graph if the run has one
    rows: QueryRows
    options: dict
    projected: list[Tensor]  # [N, Hq * Dv], what the output projection got


class SavedAttention:
    """A reading: every layer's attention of some rows, for what is computed at the end of the run.

    It holds k and v of all layers, as a cache for generation would.
    """

    uses_lse = alike = False

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.position = rows.position.clamp(min=0).long()  # [N]
        self.layers: list[SavedLayer] = []

    def rows_in(self, number: int) -> None:
        """None: it takes them itself, without a gradient."""

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Save one layer."""
        if run.finished:
            return
        full_out, rows = layer.out, self.rows.at(layer.window)
        if torch.is_grad_enabled() and not full_out.requires_grad:  # nothing below is trainable
            full_out.requires_grad_()
        out = full_out.detach()[rows.sequence.long(), self.position]
        q, k, v = (x.detach() for x in (rows.take(layer.q), layer.k, layer.v))
        with torch.no_grad():
            options = {**layer.options, "lse": layer.normaliser(self.rows)}
        projected = self._next_input(layer.module)
        saved = SavedLayer(layer.module, q, k, v, out, full_out, rows, options, projected)
        self.layers.append(saved)

    def _next_input(self, attention: nn.Module) -> list[Tensor]:
        """A list that receives the rows of the output projection's next input."""
        found, projection = [], getattr(attention, "o_proj", None)

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            hook.remove()
            found.append(args[0].detach()[self.rows.sequence.long(), self.position])

        if projection is not None:
            hook = projection.register_forward_pre_hook(keep)
        return found


def contributions(
    model: nn.Module,
    saved: SavedAttention,
    normed: Tensor,
    hidden: Tensor,
    target: Tensor,
    columns: Tensor,
) -> Tensor:
    """(C1) of each row's token on the columns, by layer.

    Args:
        model: the attached model.
        saved: the rows' attention in every layer.
        normed: [N, D] the rows' input of the final norm.
        hidden: [N, D] its output, times the logits' scale.
        target: int64 [N] the token of each row; a padding row's is negative.
        columns: int32 [B, C] key columns.

    Returns:
        [N, L, C] fp32: `sum over heads of A * (v . W_O^T d)`, with d = u_w * norm_weight / RMS(x^L)
        for an RMS norm.

    Raises:
        ValueError: a final norm, an output projection or a residual branch that is not of a known
            form, by name.

    Source: (C1).
    """
    with gathered(model, model.get_output_embeddings()) as head:
        u = unembedding(head, hidden, target)
    norm = final_norm(model)
    with gathered(model, norm) as call:
        direction = through_norm(norm, normed, u, call)
    maps = []
    for layer in saved.layers:
        if not layer.projected:
            wanted = "attention with an output projection named o_proj"
            fail("gk_record", wanted, type(layer.module).__name__)
        projection, d, z = layer.module.o_proj, direction, layer.projected[0]
        norm = _post_norm(model, layer.module)
        with gathered(model, projection) as project:
            if norm is not None:
                branch = project(z).detach()
                with gathered(model, norm) as call:
                    d = through_norm(norm, branch, direction, call)
            g = pull_back(project, d.to(layer.out.dtype), z.shape[1]) * _gate(layer)
        maps.append(_map(layer, g, columns, rectify=False))
    return torch.stack(maps, 1)


def gradcam(
    saved: SavedAttention, hidden: Tensor, target: Tensor, head: nn.Module, columns: Tensor
) -> Tensor:
    """`sum over heads of A * relu(dy / dA)` of each row's logit y, by layer.

    Args:
        saved: the rows' attention in every layer, with the graph of the run.
        hidden: [B, R, D] last hidden states of the rows, in that graph.
        target: int64 [B, R].
        head: the output embeddings.
        columns: int32 [B, C] key columns.

    Returns:
        [B * R, L, C] fp32.

    Source: arXiv 2412.08110, G of (H3).
    """
    batch, rows = target.shape
    g = [torch.zeros_like(layer.out) for layer in saved.layers]  # [N, H, Dv] each
    outputs = [layer.full_out for layer in saved.layers]
    for r in range(rows):  # sequences do not meet: one backward pass for all of them
        logits = head(hidden[:, r]).gather(1, target[:, r : r + 1].clamp(min=0))
        last = r == rows - 1
        gradients = torch.autograd.grad(logits.sum(), outputs, retain_graph=not last)
        for own, gradient, layer in zip(g, gradients, saved.layers, strict=True):
            at = torch.arange(batch, device=gradient.device) * rows + r
            own[at] = gradient[layer.rows.sequence[at].long(), saved.position[at]]
    layers = zip(saved.layers, g, strict=True)
    return torch.stack([_map(layer, own, columns, rectify=True) for layer, own in layers], 1)


def _map(layer: SavedLayer, g: Tensor, columns: Tensor, *, rectify: bool) -> Tensor:
    """[N, C] of one layer along g [N, H * Dv] or [N, H, Dv]."""
    g = g.view(layer.out.shape).to(layer.v.dtype)
    options = {"over": "visible", "rectify": rectify, **layer.options}
    with torch.no_grad():
        return attention_contribution(layer.q, layer.k, layer.v, g, layer.rows, columns, **options)


def _gate(layer: SavedLayer) -> Tensor | float:
    """[N, Hq * Dv]: what a layer multiplies its attention by before the output projection."""
    out, z = layer.out.flatten(1), layer.projected[0]
    if torch.equal(out, z):
        return 1.0
    if z.shape != out.shape or "sigmoid" not in forward_source(type(layer.module)):
        got = f"{type(layer.module).__name__}, which changes it in between"
        fail("gk_record", "attention that the output projection gets as it is, or gated", got)
    return torch.where(out == 0, 0.0, z / out)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm before the output head."""
    decoder = text_decoder(model)
    found = (getattr(decoder, name, None) for name in FINAL_NORMS)
    norm = next((norm for norm in found if norm is not None), None)
    if norm is None:
        wanted = f"a decoder with a final norm named {', '.join(FINAL_NORMS)}"
        fail("gk_record", wanted, type(decoder).__name__)
    return norm


def _post_norm(model: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The norm that an attention's output passes before it is added to the residual stream."""
    layer = text_decoder(model).layers[attention.__dict__[LAYER]]
    if hasattr(layer, "residual_multiplier"):
        fail("gk_record", "residual branches that are added as they are", type(layer).__name__)
    for name, sign in POST_NORMS:
        if hasattr(layer, sign):
            return getattr(layer, name)
    return None


def through_norm(
    norm: nn.Module, x: Tensor, direction: Tensor, call: Callable | None = None
) -> Tensor:
    """The direction before a norm, its statistic held at x: `norm(x) . direction = x . result + c`.

    The norm's weights are measured, not read, since families store them differently (Gemma's are
    offsets from one). An RMS norm does not centre, a layer norm does.

    Args:
        norm: an RMS or layer norm.
        x: [N, D] its input.
        direction: [N, D] at its output.
        call: what calls the norm where it is gathered; None: itself.

    Raises:
        ValueError: a module that is neither.
    """
    dtype = next(iter(norm.parameters()), x).dtype
    with torch.no_grad():
        x = x.detach()
        signs = torch.ones_like(x[:1])
        signs[:, 1::2] = -1.0  # mean 0, mean square 1
        y = (call or norm)(torch.cat((signs, -signs, signs.abs(), x)).to(dtype)).float()
        eps = getattr(norm, "variance_epsilon", None)
        eps = getattr(norm, "eps", 0.0) if eps is None else eps
        bias = (y[0] + y[1]) / 2
        weight = (y[0] - y[1]) / 2 * signs[0].float() * (1.0 + eps) ** 0.5
        centred = bool((y[2] - bias).abs().max() < 0.5 * weight.abs().max())
        x = x.float()
        x = x - x.mean(-1, keepdim=True) if centred else x
        rms = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        known, tolerance = weight * x / rms + bias, 0.05 if dtype.itemsize == 2 else 1e-3
        if bool((known - y[3:]).abs().max() > tolerance * y[3:].abs().max()):
            fail("gk_record", "RMS or layer norms", type(norm).__name__)
        d = direction.float() * weight / rms
        return d - d.mean(-1, keepdim=True) if centred else d


def pull_back(projection: Callable, direction: Tensor, width: int) -> Tensor:
    """[N, D] -> [N, width]: W^T direction for any affine module (LoRA, bias, quantised weights)."""
    with torch.inference_mode(False), torch.enable_grad():
        direction = direction.detach().clone()
        x = direction.new_zeros(len(direction), width, requires_grad=True)
        y = projection(x)
        return torch.autograd.grad(y, x, direction.to(y.dtype))[0]
