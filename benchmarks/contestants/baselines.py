"""What people write today, in plain torch, on the same rows as ours.

An adapter prepares, outside the clock, what does not depend on the float inputs (masks, indices),
and returns a function from the inputs to the differentiable results. One sequence, no softcap, no
lse.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import groundkern as gk
from groundkern.ops.cases import Call

Step = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


class Refused(Exception):
    """Why an adapter cannot run a call, in one sentence; results show it."""


def usable_keys(call: Call) -> Tensor:
    """bool [N, S]: the keys each row may use."""
    rows, keys = call.options["rows"], call.inputs["k"].shape[2]
    j = torch.arange(keys, device=rows.start.device)
    usable = (j >= rows.start[:, None]) & (j < rows.stop[:, None])
    allowed = call.options.get("allowed")
    if allowed is not None:
        usable = usable & allowed.to_bool()[allowed.index.long()]
    return usable


def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    """fp32 [N, Hq, J] of q [N, Hq, D] on k [1, Hkv, J, D] without repeating k."""
    n, heads, d = q.shape
    kv_heads = k.shape[1]
    packed = q.view(n, kv_heads, heads // kv_heads, d).transpose(0, 1).reshape(kv_heads, -1, d)
    s = (packed * d**-0.5) @ k[0].transpose(1, 2)  # [Hkv, N * group, J]
    return s.view(kv_heads, n, -1, s.shape[-1]).transpose(0, 1).reshape(n, heads, -1).float()


def repeated_scores(q: Tensor, k: Tensor) -> Tensor:
    """fp32 [N, Hq, S] with k repeated over its group, as eager attention does."""
    k = k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)  # [Hq, S, D]
    return (q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5).transpose(0, 1).float()


def eager_attention(call: Call) -> Step:
    """Full probabilities of the gathered rows over all keys."""
    usable = usable_keys(call)

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        s = repeated_scores(x["q"], x["k"]).masked_fill(~usable[:, None], -torch.inf)
        v = x["v"][0].repeat_interleave(x["q"].shape[1] // x["v"].shape[1], 0)
        p = s.softmax(-1).to(v.dtype)
        return ((p.transpose(0, 1) @ v).transpose(0, 1),)

    return step


def gathered_attention(call: Call) -> Step:
    """Gathers the keys that some row uses, then plain torch on those."""
    usable = usable_keys(call)
    used = usable.any(0).nonzero()[:, 0]
    blocked = ~usable[:, used][:, None]  # [N, 1, U]

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        k, v = x["k"].index_select(2, used), x["v"].index_select(2, used)
        p = grouped_scores(x["q"], k).masked_fill(blocked, -torch.inf).softmax(-1).to(v.dtype)
        n, heads, _ = p.shape
        kv_heads = v.shape[1]
        packed = p.view(n, kv_heads, -1, len(used)).transpose(0, 1)
        out = packed.reshape(kv_heads, -1, len(used)) @ v[0]
        out = out.view(kv_heads, n, heads // kv_heads, -1).transpose(0, 1)
        return (out.reshape(n, heads, -1),)

    return step


def sdpa(call: Call) -> Step:
    """F.scaled_dot_product_attention of the gathered rows with a boolean mask."""
    mask = usable_keys(call)[None, None]

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q = x["q"].transpose(0, 1)[None]  # [1, Hq, N, D]
        out = F.scaled_dot_product_attention(q, x["k"], x["v"], attn_mask=mask, enable_gqa=True)
        return (out[0].transpose(0, 1),)

    return step


def whole_attention(call: Call) -> Step:
    """Eager attention of all S rows with [Hq, S, S] probabilities, of which ours are a few rows."""
    usable, keys = usable_keys(call), call.inputs["k"].shape[2]
    at = call.options["rows"].position.long()
    mask = torch.ones(keys, keys, dtype=torch.bool, device=at.device).tril()
    mask[at] = usable
    heads, d = call.inputs["q"].shape[1:]
    queries = torch.randn(heads, keys, d, device=at.device, dtype=call.inputs["q"].dtype)

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q = queries.index_copy(1, at, x["q"].transpose(0, 1))
        k, v = (x[n][0].repeat_interleave(heads // x[n].shape[1], 0) for n in "kv")
        s = q @ k.transpose(1, 2) * d**-0.5  # [Hq, S, S]
        p = s.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
        return ((p @ v)[:, at].transpose(0, 1),)

    return step


def _map_result(call: Call, p: Tensor, x: dict[str, Tensor], columns: Tensor) -> tuple[Tensor, ...]:
    """The result of the call's function from p [N, Hq, C], the probabilities on the columns."""
    if call.function is gk.attention_map:
        return (p.mean(1),)
    if call.function is gk.attention_contribution:
        v = x["v"].index_select(2, columns)
        scale = x["g"].shape[-1] ** 0.5  # grouped_scores divides by it
        return ((p * grouped_scores(x["g"], v) * scale).sum(1),)
    target = x["target"] / x["target"].sum(-1, keepdim=True)
    entropy = torch.xlogy(target, target).sum(-1)
    if call.options["heads"] == "mean":
        return (entropy - (target * p.mean(1).log()).sum(-1),)
    return ((entropy[:, None] - (target[:, None] * p.log()).sum(-1)).mean(1),)


def columns_of(call: Call) -> Tensor:
    """int64 [C]: the key columns of a map that plain torch can express."""
    columns = call.options["columns"][0].long()
    if call.options.get("allowed") is not None or bool((columns < 0).any()):
        raise Refused("the baselines take maps without key sets and without padding columns")
    if not bool((call.options["rows"].stop.min() > columns.max()).all()):
        raise Refused("the baselines take rows that see all columns")
    return columns


def eager_map(call: Call) -> Step:
    """Full probabilities of the gathered rows over all keys, then the columns."""
    columns, usable = columns_of(call), usable_keys(call)
    if call.options["over"] == "columns":
        usable = torch.zeros_like(usable).index_fill(1, columns, True)

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        s = repeated_scores(x["q"], x["k"]).masked_fill(~usable[:, None], -torch.inf)
        return _map_result(call, s.softmax(-1)[..., columns], x, columns)

    return step


def gathered_map(call: Call) -> Step:
    """Grouped scores in plain torch: on the gathered columns, or on all keys and then gathered."""
    columns, usable = columns_of(call), usable_keys(call)
    only = call.options["over"] == "columns"

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if only:
            p = grouped_scores(x["q"], x["k"].index_select(2, columns)).softmax(-1)
        else:
            s = grouped_scores(x["q"], x["k"]).masked_fill(~usable[:, None], -torch.inf)
            p = s.softmax(-1).index_select(2, columns)
        return _map_result(call, p, x, columns)

    return step


def closed_form_kl(call: Call) -> Step:
    """KL of every head as sum P log P - scale q . (P k) + lse: no probability on the columns."""
    if call.function is not gk.attention_kl or call.options["heads"] != "each":
        raise Refused("the closed form is that of the KL per head")
    columns, usable = columns_of(call), usable_keys(call)
    only = call.options["over"] == "columns"

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q, k = x["q"], x["k"].index_select(2, columns)
        target = x["target"] / x["target"].sum(-1, keepdim=True)
        center = (target.to(k.dtype) @ k[0]).transpose(0, 1)  # [N, Hkv, D]
        center = center.repeat_interleave(q.shape[1] // k.shape[1], 1)
        expected = (q * center).float().sum(-1) * q.shape[-1] ** -0.5  # [N, Hq]
        if only:
            lse = grouped_scores(q, k).logsumexp(-1)
        else:
            s = grouped_scores(q, x["k"]).masked_fill(~usable[:, None], -torch.inf)
            lse = s.logsumexp(-1)
        entropy = torch.xlogy(target, target).sum(-1)
        return (entropy + (lse - expected).mean(1),)

    return step


def _smoothed(call: Call, z: Tensor, target: Tensor) -> Tensor:
    """(D3) on fp32 logits of counted rows: the bag's labels other than the row's own share the
    smoothing."""
    bags, b = call.options["bags"], call.options["smoothing"]
    log_p = z.log_softmax(-1)
    own = log_p.gather(1, target[:, None])[:, 0]
    rest = log_p[:, bags.ids].sum(1) - own  # every own label is in the one bag
    return -((1 - b) * own + b / (len(bags.ids) - 1) * rest).mean()


def eager_cross_entropy(call: Call) -> Step:
    """F.cross_entropy((h @ w.T).float()) of all rows, as transformers' loss does."""
    target, counted = call.options["target"], call.options["target"] != -100
    smooth = "bags" in call.options

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        z = (x["hidden"] @ x["weight"].T).float()
        if smooth:
            return (_smoothed(call, z[counted], target[counted]),)
        return (F.cross_entropy(z, target),)

    return step


def counted_cross_entropy(call: Call) -> Step:
    """The same on the counted rows only."""
    at = (call.options["target"] != -100).nonzero()[:, 0]
    if len(at) == len(call.options["target"]):
        raise Refused("every row counts: the same as on all rows")
    target, smooth = call.options["target"][at], "bags" in call.options

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        z = (x["hidden"].index_select(0, at) @ x["weight"].T).float()
        return (_smoothed(call, z, target) if smooth else F.cross_entropy(z, target),)

    return step


BASELINES: dict[str, dict[str, Callable[[Call], Step]]] = {
    "side_attention": {
        "eager, full probabilities": eager_attention,
        "gathered keys, plain torch": gathered_attention,
        "SDPA, boolean mask": sdpa,
    },
    "attention_map": {
        "eager, full probabilities": eager_map,
        "grouped scores, plain torch": gathered_map,
        "closed form per head": closed_form_kl,
    },
    "linear_cross_entropy": {
        "F.cross_entropy(h @ w.T)": eager_cross_entropy,
        "F.cross_entropy, counted rows": counted_cross_entropy,
    },
}
WHOLE = {"eager, whole [S, S]": whole_attention}
