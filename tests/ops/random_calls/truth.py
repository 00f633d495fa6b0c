"""The attention ops in plain torch with full scores, in log space so that nothing underflows.

In fp64 the truth, in a call's own dtype the error budget. Shares no code with the library but the
unpacking of key sets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selected:
    """Which keys count in each row of a call."""

    visible: Tensor  # bool [N, S]
    usable: Tensor  # bool [N, S]: visible and in the row's set
    at: Tensor | None  # int64 [N, C]: each row's columns, padding as 0
    own: Tensor | None  # bool [N, C]

    @classmethod
    def of(cls, options: dict, keys: int) -> "Selected":
        rows, allowed, columns = options["rows"], options["allowed"], options.get("columns")
        j = torch.arange(keys)
        visible = (j >= rows.start[:, None]) & (j < rows.stop[:, None])
        usable = visible
        if allowed is not None:
            everything = torch.ones(1, keys, dtype=torch.bool)
            table = torch.cat([everything, allowed.to_bool()])
            usable = visible & table[allowed.index.long() + 1]
        if columns is None:
            return cls(visible, usable, None, None)
        at = columns.long()[rows.sequence.long()]  # [N, C]
        own = (at >= 0) & usable.gather(1, at.clamp(min=0))
        return cls(visible, usable, at.clamp(min=0), own)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def dots(x: Tensor, y: Tensor, sequence: Tensor) -> Tensor:
    """x [N, Hq, D] . y [B, Hkv, S, D] of each row's sequence: [N, Hq, S], made in their dtype."""
    (n, heads, dim), (batch, kv_heads, keys, _) = x.shape, y.shape
    group, parts = heads // kv_heads, []
    for b in range(batch):
        some = x[sequence == b]
        packed = some.view(-1, kv_heads, group, dim).permute(1, 0, 2, 3).flatten(1, 2)
        part = packed @ y[b].transpose(1, 2)  # [Hkv, n g, S]
        parts.append(part.view(kv_heads, len(some), group, keys).permute(1, 0, 2, 3))
    return wide(torch.cat(parts).flatten(1, 2).reshape(n, heads, keys))


def scores(q: Tensor, k: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """(scaled, softcapped too) [N, Hq, S]."""
    scale = options["scale"] or q.shape[-1] ** -0.5
    raw = dots(q, k, options["rows"].sequence) * scale
    cap = options["softcap"]
    return raw, raw if cap is None else cap * torch.tanh(raw / cap)


def log_sum(s: Tensor, kept: Tensor) -> Tensor:
    """Log-sum-exp [N, H] over the kept [N, S] of s [N, H, S]; 0 without gradient if there are
    none."""
    some = kept.any(-1)[:, None]
    if s.shape[-1] == 0:
        return s.sum(-1)
    filled = torch.where(kept[:, None] | ~some[..., None], s, -torch.inf)
    return torch.where(some, filled.logsumexp(-1), 0.0)


def side_attention(x: dict, options: dict, selected: Selected) -> tuple[Tensor, ...]:
    q, v, kept = x["q"], x["v"], selected.usable
    _, s = scores(q, x["k"], options)
    lse = log_sum(s, kept)
    p = torch.where(kept[:, None], s - lse[..., None], -torch.inf).exp().to(q.dtype)
    group, sequence, outs = q.shape[1] // v.shape[1], options["rows"].sequence, []
    for b in range(v.shape[0]):
        part = p[sequence == b].unflatten(1, (v.shape[1], group))  # [n, Hkv, g, S]
        outs.append(torch.einsum("nhgs,hsd->nhgd", part, v[b]).flatten(1, 2))
    empty = ~kept.any(-1)
    return torch.cat(outs), lse.masked_fill(empty[:, None], -torch.inf)


def _log_p(x: dict, options: dict, selected: Selected) -> Tensor:
    """(K1) log p [N, Hq, C]; meaningful on own columns."""
    _, s = scores(x["q"], x["k"], options)
    at, own = selected.at, selected.own
    on_columns = s.gather(2, at[:, None].expand(-1, s.shape[1], -1))
    if options["over"] == "columns":
        return on_columns - log_sum(on_columns, own)[..., None]
    return on_columns - log_sum(s, selected.visible)[..., None]


def _weight(x: dict) -> Tensor:
    q = x["q"]
    given = x.get("head_weight")
    if given is None:
        return wide(q.new_full(q.shape[:2], 1.0 / q.shape[1]))
    return wide(given).expand(q.shape[:2])


def attention_map(x: dict, options: dict, selected: Selected) -> tuple[Tensor, ...]:
    log_p = _log_p(x, options, selected)
    p = torch.where(selected.own[:, None], log_p, -torch.inf).exp()
    return ((_weight(x)[..., None] * p).sum(1),)


def attention_contribution(x: dict, options: dict, selected: Selected) -> tuple[Tensor, ...]:
    log_p = _log_p(x, options, selected)
    p = torch.where(selected.own[:, None], log_p, -torch.inf).exp()
    value = dots(x["g"], x["v"], options["rows"].sequence)
    value = value.gather(2, selected.at[:, None].expand(-1, value.shape[1], -1))
    return ((p * (value.relu() if options["rectify"] else value)).sum(1),)


def renormalised(target: Tensor, own: Tensor) -> Tensor:
    mass = torch.where(own, target, 0.0)
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total > 0, total, 1.0)


def attention_kl(x: dict, options: dict, selected: Selected) -> tuple[Tensor, ...]:
    log_p, own, weight = _log_p(x, options, selected), selected.own, _weight(x)
    target = renormalised(x["target"].to(log_p.dtype), own)  # [N, C]
    used = target > 0
    entropy = (target * torch.where(used, target, 1.0).log()).sum(-1)  # [N]
    if options["heads"] == "each":
        cross = torch.where(used[:, None], target[:, None] * log_p, 0.0).sum(-1)  # [N, Hq]
        return ((weight * (entropy[:, None] - cross)).sum(1),)
    log_p = torch.where(used[:, None], log_p, 0.0)
    counted = torch.where((weight > 0)[..., None], log_p, -torch.inf)
    top = counted.amax(1, keepdim=True).detach()
    top = torch.where(top.isfinite(), top, 0.0)
    most = 700.0 if log_p.dtype == torch.float64 else 80.0  # a head of weight 0 may lie far above
    mixture = (weight[..., None] * (log_p - top).clamp(max=most).exp()).sum(1)
    log_map = top[:, 0] + torch.where(used, mixture, 1.0).log()
    return (entropy - torch.where(used, target * log_map, 0.0).sum(-1),)


FUNCTIONS = {
    "side": side_attention,
    "map": attention_map,
    "contribution": attention_contribution,
    "kl": attention_kl,
}
