"""The ops as people write them today: full scores, full probabilities, full logits, autograd.

An independent oracle: in fp64 the truth, in a call's own dtype the error budget. It shares no code
with the library.
"""

import torch
from torch import Tensor


def _scores(q: Tensor, k: Tensor, rows, scale, softcap) -> Tensor:
    """[N, Hq, S], computed in q's dtype and read in fp32 or better, as eager attention does."""
    group = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(group, 1)[rows.sequence.long()]  # [N, Hq, S, D]
    s = (keys @ q[..., None])[..., 0] * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    return s if s.dtype == torch.float64 else s.float()


def _visible(rows, keys: int) -> Tensor:
    j = torch.arange(keys, device=rows.start.device)
    return (j >= rows.start[:, None]) & (j < rows.stop[:, None])


def _members(allowed, keys: int, n: int) -> Tensor:
    if allowed is None:
        return torch.ones(n, keys, dtype=torch.bool)
    table = allowed.to_bool()
    everything = torch.ones(1, keys, dtype=torch.bool, device=table.device)
    return torch.cat([everything, table])[allowed.index.long() + 1]


def _softmax(s: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (0 in rows without keys) and log-sum-exp (-inf there)."""
    some = kept.any(-1)[:, None, None]
    filled = torch.where(kept[:, None] | ~some, s, -torch.inf)
    lse = filled.logsumexp(-1)
    p = torch.where(some, filled.softmax(-1), 0.0)
    return p, torch.where(some[..., 0], lse, -torch.inf)


def side_attention(q, k, v, rows, *, allowed=None, lse=None, scale=None, softcap=None):
    s = _scores(q, k, rows, scale, softcap)
    kept = _visible(rows, k.shape[2]) & _members(allowed, k.shape[2], len(q)).to(q.device)
    p, own_lse = _softmax(s, kept)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)[rows.sequence.long()]
    return (p.to(q.dtype)[..., None, :] @ values)[..., 0, :], own_lse


def _columns(q, k, rows, columns, over, allowed, scale, softcap, lse=None):
    """p [N, Hq, C] and own [N, C]. A given lse is the normaliser, an input of its own."""
    s = _scores(q, k, rows, scale, softcap)
    visible = _visible(rows, k.shape[2])
    usable = visible & _members(allowed, k.shape[2], len(q)).to(q.device)
    at = columns[rows.sequence.long()].long()  # [N, C]
    own = (at >= 0) & usable.gather(1, at.clamp(min=0))
    listed = torch.zeros_like(usable)
    for n, c in own.nonzero().tolist():
        listed[n, at[n, c]] = True
    p, _ = _softmax(s, visible if over == "visible" else listed)
    if lse is not None:
        there = ~lse.isinf()[..., None]
        p = torch.where(there, (s - torch.where(there, lse[..., None], 0.0)).exp(), 0.0)
    p = p.gather(2, at.clamp(min=0)[:, None].expand(-1, q.shape[1], -1))
    return torch.where(own[:, None], p, 0.0), own


def _weights(head_weight, q):
    if head_weight is None:
        return torch.full(q.shape[:2], 1 / q.shape[1], dtype=q.dtype, device=q.device)
    return head_weight.expand(q.shape[:2])


def attention_map(
    q, k, rows, columns, *, over, allowed=None, lse=None, head_weight=None, scale=None, softcap=None
):
    p, _ = _columns(q, k, rows, columns, over, allowed, scale, softcap, lse)
    return (_weights(head_weight, q)[..., None] * p).sum(1)


def attention_contribution(
    q,
    k,
    v,
    g,
    rows,
    columns,
    *,
    over,
    rectify=False,
    allowed=None,
    lse=None,
    scale=None,
    softcap=None,
):
    p, _ = _columns(q, k, rows, columns, over, allowed, scale, softcap, lse)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)[rows.sequence.long()]
    at = columns[rows.sequence.long()].long().clamp(min=0)
    values = values.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, v.shape[3]))
    value = (values @ g[..., None])[..., 0]
    return (p * (value.relu() if rectify else value).to(p.dtype)).sum(1)


def attention_kl(
    q,
    k,
    target,
    rows,
    columns,
    *,
    over,
    heads="mean",
    allowed=None,
    lse=None,
    head_weight=None,
    scale=None,
    softcap=None,
):
    p, own = _columns(q, k, rows, columns, over, allowed, scale, softcap, lse)
    target = torch.where(own, target.to(p.dtype), 0.0)
    total = target.sum(-1, keepdim=True)
    target = target / torch.where(total > 0, total, 1.0)
    used = target > 0
    weight = _weights(head_weight, q)[..., None]
    maps = (weight * p).sum(1, keepdim=True) if heads == "mean" else p
    terms = target[:, None] * (
        torch.where(used, target, 1.0).log()[:, None] - torch.where(used[:, None], maps, 1.0).log()
    )
    per_map = terms.sum(-1)  # [N, 1 or Hq]
    return per_map[:, 0] if heads == "mean" else (weight[..., 0] * per_map).sum(1)


def _log_softmax(hidden, weight, bias, softcap):
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z, z.log_softmax(-1)


def linear_cross_entropy(
    hidden,
    weight,
    target,
    *,
    bias=None,
    bags=None,
    smoothing=0.0,
    row_weight=None,
    reduction="mean",
    ignore_index=-100,
    softcap=None,
):
    shape, target = target.shape, target.reshape(-1)
    z, log_p = _log_softmax(hidden.reshape(-1, hidden.shape[-1]), weight, bias, softcap)
    plain = z.detach(), log_p.detach()
    losses, chosen = [], []
    for n, label in enumerate(target.tolist()):
        if label == ignore_index:
            losses.append(log_p[n, 0] * 0)
            chosen.append((0.0, 0.0, -1))
            continue
        loss = -log_p[n, label]
        logits, log_probs = plain[0][n], plain[1][n]
        chosen.append((float(log_probs[label]), float(logits.logsumexp(-1)), int(logits.argmax())))
        image = -1 if bags is None else int(bags.index[n])
        if image >= 0 and smoothing > 0:
            ids = bags.ids[int(bags.offsets[image]) : int(bags.offsets[image + 1])].tolist()
            rest = [y for y in ids if y != label]
            if rest:
                mean = sum(log_p[n, y] for y in rest) / len(rest)
                loss = (1 - smoothing) * loss - smoothing * mean
        losses.append(loss)
    loss = torch.stack(losses) if losses else log_p.sum(-1)
    if row_weight is not None:
        loss = loss * row_weight.reshape(-1).to(loss.dtype)
    if reduction == "none":
        loss = loss.view(shape)
    else:
        count = max(1, int((target != ignore_index).sum())) if reduction == "mean" else 1
        loss = loss.sum() / count
    statistics = [torch.tensor([c[i] for c in chosen], dtype=z.dtype).view(shape) for i in (0, 1)]
    return loss, *statistics, torch.tensor([c[2] for c in chosen], dtype=torch.int64).view(shape)


def linear_log_prob(hidden, weight, target, *, bias=None, ignore_index=-100, softcap=None):
    z, log_p = _log_softmax(hidden, weight, bias, softcap)
    counted = target != ignore_index
    at = target.clamp(min=0)[:, None]
    log_prob = torch.where(counted, log_p.gather(1, at)[:, 0], 0.0)
    return (
        log_prob,
        torch.where(counted, z.logsumexp(-1), 0.0),
        torch.where(counted, z.argmax(-1), -1),
    )
