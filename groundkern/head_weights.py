"""GUI-AIMA's weights of attention heads, found anew for every supervised row.

The tokens of the instruction that are most like the image say which heads count: a head whose
attention from these tokens lies on the image weighs more. Equations are numbered in
docs/methods/gui-aima.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern.checks import require


def likeness(queries: Tensor, image: Tensor, own: Tensor) -> Tensor:
    """Sum over the image's tokens of their cosine with each query token.

    Equals `(F.normalize(queries) @ F.normalize(image).mT * own[:, None]).sum(-1)`, without the
    [Q, C] cosines of each row.

    Args:
        queries: [B, R, Q, D] float, hidden states of the query tokens of each row.
        image: [B, C, D] float, hidden states of visual tokens.
        own: bool [B, R, C], those of each row's image.

    Returns:
        [B, R, Q] fp32.

    Source: GUI-AIMA (arXiv 2511.00810), c of (G1), in one layer.
    """
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    directions = F.normalize(image.to(wide), dim=-1, eps=1e-8)
    total = torch.einsum("brc,bcd->brd", own.to(wide), directions)
    return torch.einsum("brqd,brd->brq", F.normalize(queries.to(wide), dim=-1, eps=1e-8), total)


def sink_queries(likeness: Tensor, valid: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The query tokens of each row that are most like its image.

    Args:
        likeness: [N, Q] float, summed over layers.
        valid: bool [N, Q], the query tokens that exist.
        most: K, how many to take.

    Returns:
        Indices int64 [N, min(K, Q)], the most alike first, and which of them exist, bool.

    Raises:
        ValueError: K below 1.

    Source: GUI-AIMA (arXiv 2511.00810), S of (G1).
    """
    require(most >= 1, "most", "a number of query tokens above 0", most)
    lowest = likeness.masked_fill(~valid, -torch.inf)
    index = lowest.topk(min(most, likeness.shape[1]), dim=1).indices
    return index, valid.gather(1, index)


def sink_head_weight(mass: Tensor) -> Tensor:
    """Weights of heads by the mass that chosen query tokens have on the image.

    Equals `mass.sum(1).flatten(1).softmax(1)` in the shape of layers and heads.

    Args:
        mass: [N, K, L, H] float, 0 for a query token that does not exist; differentiable.

    Returns:
        [N, L, H], each row sums to 1.

    Source: GUI-AIMA (arXiv 2511.00810), w of (G1).
    """
    total = mass.sum(1)  # [N, L, H]
    return total.flatten(1).softmax(1).view_as(total)


def pattern_head_weight(mass: Tensor, likeness: Tensor, valid: Tensor) -> Tensor:
    """Weights of heads by how close their masses are to a pattern over all query tokens.

    Equals `(-KL(g || f)).softmax` over layers and heads with `g = likeness.softmax` and
    `f = mass.softmax`, both over the query tokens.

    Args:
        mass: [N, Q, L, H] float, differentiable.
        likeness: [N, Q] float, summed over layers; no gradient.
        valid: bool [N, Q], the query tokens that exist; without any, all heads weigh the same.

    Returns:
        [N, L, H], each row sums to 1.

    Source: GUI-AIMA (arXiv 2511.00810), the released code's second form, (G1).
    """
    some = valid.any(1, keepdim=True)  # a row without any would divide 0 by 0
    there = valid | ~some
    g = likeness.detach().masked_fill(~there, -torch.inf).softmax(1)  # [N, Q]
    f = mass.masked_fill(~there[:, :, None, None], -torch.inf).log_softmax(1)
    f = f.masked_fill(~there[:, :, None, None], 0.0)
    least = 1e-12  # the code's floor of both
    g = g.clamp_min(least) * there
    f = f.clamp_min(torch.tensor(least).log().item())
    distance = (torch.xlogy(g, g)[:, :, None, None] - g[:, :, None, None] * f).sum(1)  # [N, L, H]
    return (-distance).flatten(1).softmax(1).view_as(distance)
