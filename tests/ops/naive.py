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


def _log_softmax(hidden, weight, bias, softcap, temperature):
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    return z, z.log_softmax(-1)


def _ids(target, ignore_index) -> list[list[tuple[int, float]]]:
    """Each row's labels and what they count for; none: the row is ignored."""
    if isinstance(target, Tensor):
        return [[(y, 1.0)] if y != ignore_index else [] for y in target.flatten().tolist()]
    size = target.ids.shape[-1]
    pairs = zip(target.ids.reshape(-1, size).tolist(), target.probabilities.reshape(-1, size))
    return [
        [(y, float(p)) for y, p in zip(ids, parts, strict=True) if y != ignore_index]
        for ids, parts in pairs
    ]


def _label_weights(of_rows, like, bags, smoothing, label_smoothing, class_weight) -> Tensor:
    """t [N, V]: what each label's -log p counts for in each row's loss."""
    t = torch.zeros_like(like)
    for n, labels in enumerate(of_rows):
        image = -1 if bags is None else int(bags.index[n])
        rest = []
        if image >= 0 and smoothing > 0 and labels:
            ids = bags.ids[int(bags.offsets[image]) : int(bags.offsets[image + 1])].tolist()
            rest = [y for y in ids if y != labels[0][0]]
        for y, share in labels:
            t[n, y] += share * (1 - smoothing if rest else 1)
        for y in rest:
            t[n, y] += smoothing / len(rest)
        if labels:
            t[n] = (1 - label_smoothing) * t[n] + label_smoothing / t.shape[1]
    return t if class_weight is None else t * class_weight.to(t)


def _chosen(z, log_p, of_rows, top_k, label=None) -> tuple[Tensor, ...]:
    """log p of the own label, lse, entropy, likeliest id, top ids and their log p."""
    kept = torch.tensor([bool(labels) for labels in of_rows], dtype=torch.bool, device=z.device)
    own = [max(labels, key=lambda x: x[1])[0] if labels else 0 for labels in of_rows]
    own = torch.tensor(own, dtype=torch.int64, device=z.device) if label is None else label
    log_prob = log_p.gather(1, own[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    floats = [torch.where(kept, x, 0.0) for x in (log_prob, z.logsumexp(-1), entropy)]
    ids = z.detach().argsort(dim=1, descending=True, stable=True)[:, : max(1, top_k)]
    ids = torch.where(kept[:, None], ids, -1)
    top = torch.where(kept[:, None], log_p.detach().gather(1, ids.clamp(min=0)), 0.0)
    missing = (0, top_k - ids.shape[1]) if top_k > ids.shape[1] else (0, 0)
    ids = torch.nn.functional.pad(ids, missing, value=-1)
    top = torch.nn.functional.pad(top, missing, value=-torch.inf)
    top = torch.where(kept[:, None], top, 0.0)
    return *floats, ids[:, 0], ids[:, :top_k], top[:, :top_k]


def linear_cross_entropy(
    hidden,
    weight,
    target,
    *,
    bias=None,
    softcap=None,
    temperature=1.0,
    bags=None,
    smoothing=0.0,
    label_smoothing=0.0,
    class_weight=None,
    z_loss=0.0,
    row_weight=None,
    reduction="mean",
    ignore_index=-100,
    entropy=False,
    top_k=0,
):
    shape = hidden.shape[:-1]
    rows = hidden.reshape(-1, hidden.shape[-1])
    z, log_p = _log_softmax(rows, weight, bias, softcap, temperature)
    of_rows = _ids(target, ignore_index)
    t = _label_weights(of_rows, log_p, bags, smoothing, label_smoothing, class_weight)
    label = getattr(target, "label", None)
    log_prob, lse, h, predicted, ids, top = _chosen(z, log_p, of_rows, top_k, label)
    loss = -(t * log_p).sum(-1) + z_loss * lse**2
    if row_weight is not None:
        loss = loss * row_weight.reshape(-1).to(loss.dtype)
    if reduction == "none":
        loss = loss.view(shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        counts = [1.0 for labels in of_rows if labels]
        if class_weight is not None and isinstance(target, Tensor):
            counts = [float(class_weight[labels[0][0]]) for labels in of_rows if labels]
        loss = loss.sum() / (sum(counts) or 1)
    statistics = [x.detach().view(shape) for x in (log_prob, lse, predicted)]
    if entropy:
        statistics.append(h.detach().view(shape))
    if top_k:
        statistics += [ids.view(*shape, top_k), top.view(*shape, top_k)]
    return loss, *statistics


def linear_log_prob(
    hidden,
    weight,
    target,
    *,
    bias=None,
    softcap=None,
    temperature=1.0,
    ignore_index=-100,
    entropy=False,
    top_k=0,
):
    z, log_p = _log_softmax(hidden, weight, bias, softcap, temperature)
    log_prob, lse, h, predicted, *top = _chosen(z, log_p, _ids(target, ignore_index), top_k)
    return log_prob, lse, predicted, *([h] if entropy else []), *(top if top_k else [])


def log_prob_and_entropy(*operands, **options):
    log_prob, lse, predicted, h, *top = linear_log_prob(*operands, entropy=True, **options)
    return log_prob, lse, h, predicted, *top


def linear_kl(
    hidden,
    weight,
    teacher_hidden,
    teacher_weight,
    *,
    bias=None,
    teacher_bias=None,
    kind="forward",
    beta=0.5,
    temperature=1.0,
    softcap=None,
    teacher_softcap=None,
    mask=None,
    row_weight=None,
    reduction="mean",
):
    def log_probs(h, w, b, cap):
        if hidden.dtype == torch.float64:  # the truth, of a teacher that stays in its dtype
            h, w, b = (None if x is None else x.double() for x in (h, w, b))
        z = torch.nn.functional.linear(h, w, b)
        z = z if z.dtype == torch.float64 else z.float()
        return ((z if cap is None else cap * torch.tanh(z / cap)) / temperature).log_softmax(-1)

    def kl(p, q):
        """Of log-probabilities; an entry that p leaves out adds nothing."""
        none = p == -torch.inf
        terms = torch.nn.functional.kl_div(
            q.masked_fill(none, 0.0), p.masked_fill(none, 0.0), reduction="none", log_target=True
        )
        return terms.masked_fill(none, 0.0).sum(-1)

    student = log_probs(hidden, weight, bias, softcap)
    teacher = log_probs(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap).detach()
    if kind == "forward":
        loss = kl(teacher, student)
    elif kind == "reverse":
        loss = kl(student, teacher)
    else:
        m = beta * teacher.exp() + (1 - beta) * student.exp()
        m = torch.where(m > 0, m, 1.0).log()  # what neither has adds nothing
        loss = beta * kl(teacher, m) + (1 - beta) * kl(student, m)
    counted = torch.ones(loss.shape, dtype=torch.bool) if mask is None else mask
    loss = torch.where(counted.to(loss.device), loss, 0.0)
    if row_weight is not None:
        loss = loss * row_weight.to(loss.dtype)
    if reduction == "none":
        return (loss,)
    return (loss.sum() / (max(1, int(counted.sum())) if reduction == "mean" else 1),)
