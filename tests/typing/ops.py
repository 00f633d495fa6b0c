"""What a checker says of calls of the raw ops: `make types` checks this file, nobody runs it.

A wrong call has `# type: ignore` with the error that is expected; one that is not refused is an
error itself (`warn_unused_ignores`).
"""

from typing import assert_type

import torch
from torch import Tensor

import groundkern as gk
from groundkern import losses, maps
from groundkern.compat.cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
from groundkern.compat.liger import LigerFusedLinearCrossEntropyLoss
from groundkern.compat.torch import linear_cross_entropy as torch_cross_entropy

q, k, v = torch.randn(4, 8, 16), torch.randn(2, 2, 10, 16), torch.randn(2, 2, 10, 16)
first = torch.zeros(4, dtype=torch.int32)
rows = gk.QueryRows(first, first, first, first + 1)
columns = torch.zeros(2, 3, dtype=torch.int32)
hidden, weight, target = torch.randn(4, 16), torch.randn(32, 16), torch.zeros(4, dtype=torch.int64)


def attention() -> None:
    found = gk.side_attention(q, k, v, rows, scale=0.5)
    assert_type(found, gk.SideAttention)
    assert_type(found.out, Tensor)
    out, lse = found
    assert_type(lse, Tensor)
    assert_type(gk.attention_map(q, k, rows, columns, over="visible"), Tensor)
    assert_type(gk.attention_contribution(q, k, v, q, rows, columns, over="columns"), Tensor)
    assert_type(gk.attention_kl(q, k, out, rows, columns, over="columns", heads="each"), Tensor)
    reference = gk.AttentionReference(q, k)
    assert_type(gk.attention_divergence(q, k, reference, rows, columns, kind="js"), Tensor)
    assert_type(rows.to("cuda", non_blocking=True), gk.QueryRows)
    assert_type(rows.take(k), Tensor)
    assert_type(len(rows), int)


def heads() -> None:
    found = gk.linear_cross_entropy(hidden, weight, target, reduction="sum", entropy=True)
    assert_type(found, gk.CrossEntropy)
    assert_type(found.loss, Tensor)
    assert_type(found.entropy, Tensor | None)
    soft = gk.SoftTargets(target[:, None], torch.ones(4, 1))
    assert_type(gk.linear_cross_entropy(hidden, weight, soft).loss, Tensor)
    assert_type(gk.linear_log_prob(hidden, weight, target), gk.LogProb)
    assert_type(gk.linear_kl(hidden, weight, hidden, weight, kind="reverse"), Tensor)
    assert_type(gk.logit_budget(), int | None)
    assert_type(gk.available_backends(), dict[str, str | None])


def others() -> None:
    assert_type(losses.smam(q, q, beta=0.2), losses.SmamLoss)
    assert_type(losses.map_kl(q, q), Tensor)
    assert_type(maps.target_map(torch.rand(6, 4), boxes=[(0.0, 0.0, 1.0, 1.0)]), Tensor)
    assert_type(torch_cross_entropy(hidden, weight, target), Tensor)
    assert_type(cut_cross_entropy(hidden, weight, target), Tensor | tuple[Tensor, Tensor])
    LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=30.0)


def refused() -> None:
    gk.attention_map(q, k, rows, columns)  # type: ignore[call-arg]  # without `over`
    gk.attention_map(q, k, rows, columns, over="all")  # type: ignore[arg-type]
    gk.side_attention(q, k, v)  # type: ignore[call-arg]  # without rows
    gk.side_attention(q, k, v, rows, None)  # type: ignore[call-arg]  # scale is keyword-only
    gk.side_attention(q, k, v, columns)  # type: ignore[arg-type]  # a tensor for rows
    gk.side_attention(q, k, None, rows)  # type: ignore[arg-type]  # None for v
    gk.linear_cross_entropy(hidden, weight, target, reduction="avg")  # type: ignore[arg-type]
    gk.linear_cross_entropy(hidden, weight, [1, 2])  # type: ignore[arg-type]
    gk.linear_kl(hidden, weight, hidden, weight, kind="kl")  # type: ignore[arg-type]
    gk.set_logit_budget("1GB")  # type: ignore[arg-type]
    losses.smam(q, q, 0.2)  # type: ignore[call-arg]  # beta is keyword-only
    losses.smam(q, None)  # type: ignore[arg-type]
    gk.side_attn  # type: ignore[attr-defined]  # noqa: B018
    maps.target_map(torch.rand(6, 4), kind=3)  # type: ignore[arg-type]
