"""Attention maps, contributions and their KL: what `forward` and `backward` of each backend are
handed. The three are one op of several kinds."""

from typing import NamedTuple

from torch import Tensor

from groundkern.selection import Selection

MAP = "map"  # (K2)
CONTRIBUTION = "contribution"  # (C1)
KL_MEAN = "kl_mean"  # (K3) of the head mean
KL_EACH = "kl_each"  # (K3) of each head


class Inputs(NamedTuple):
    q: Tensor  # [N, Hq, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor | None  # [B, Hkv, S, Dv], of a contribution
    g: Tensor | None  # [N, Hq, Dv], of a contribution
    head_weight: Tensor | None  # fp32 [N, Hq], of a map or a KL
    target: Tensor | None  # [N, C], of a KL
    lse: Tensor | None  # fp32 [N, Hq], the normaliser of over="visible" if it is given


class Options(NamedTuple):
    kind: str
    over: str  # "visible" | "columns": what p is normalised over
    rectify: bool  # of a contribution
    scale: float
    softcap: float  # 0: off
    lse_grad: bool = False  # the given lse is an input of its own and takes the gradient


class Upstream(NamedTuple):
    upstream: Tensor  # like the result, contiguous


class Gradients(NamedTuple):
    """None for inputs that are absent."""

    dq: Tensor
    dk: Tensor
    dv: Tensor | None
    dg: Tensor | None
    dhead_weight: Tensor | None
    dlse: Tensor | None = None  # [N, Hq], if `lse_grad`


class MapPlan(NamedTuple):
    """What the GPU kernels need of rows, key sets, columns and target alone, made once a step."""

    tiles: Tensor | None  # as in `groundkern.plan.Plan`, and so are the next four, of own columns
    key_tiles: Tensor | None
    row_tiles: Tensor | None
    row_spans: Tensor | None
    place: Tensor | None
    visible_tiles: Tensor | None  # of all visible keys, if the softmax is over them
    visible_row_spans: Tensor | None
    own_target: Tensor | None  # fp32 [N, C], renormalised over own columns, of a KL
    target_sum: Tensor | None  # fp32 [N]: its sums, 1 or 0
    lanes: int  # of a row


NO_MAP_PLAN = MapPlan(None, None, None, None, None, None, None, None, None, 0)


class Saved(NamedTuple):
    """What the forward leaves for the backward; empty where it makes it again."""

    norm: Tensor  # fp32 [N, Hq]: the normaliser
    made: Tensor  # fp32 [N, C] log P - log M, of KL_MEAN; [N, Hq] the heads' own KL, of KL_EACH


class Outputs(NamedTuple):
    result: Tensor  # [N, C], of a KL [N]
    norm: Tensor  # of `Saved`
    made: Tensor


def like_gradients(inputs: Inputs, options: Options) -> tuple[Tensor | None, ...]:
    """What each of the `Gradients` has the shape and dtype of; None for those that are absent."""
    return (*inputs[:5], inputs.lse if options.lse_grad else None)


def output_shape(inputs: Inputs, columns: Tensor, options: Options) -> tuple[int, ...]:
    """[N, C], of a KL [N]."""
    rows = inputs.q.shape[0]
    return (rows,) if options.kind in (KL_MEAN, KL_EACH) else (rows, columns.shape[1])


def saved_shapes(
    inputs: Inputs, selection: Selection, plan: MapPlan, options: Options
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the tensors of `Saved`; a plan is there where they are."""
    if plan.tiles is None:
        return (0,), (0,)
    of_heads: tuple[int, ...] = inputs.q.shape[:2]
    assert selection.columns is not None
    made = {KL_MEAN: (of_heads[0], selection.columns.shape[1]), KL_EACH: of_heads}
    return (0,) if inputs.lse is not None else of_heads, made.get(options.kind, (0,))
