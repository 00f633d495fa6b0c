"""GUI-AIMA's head weights by hand, on paper."""

from __future__ import annotations

import math

import pytest
import torch

from groundkern.head_weights import (
    likeness,
    pattern_head_weight,
    sink_head_weight,
    sink_queries,
)
from groundkern.losses import map_kl


def test_two_heads_weigh_by_their_masses():
    # Image mass of the sink query: .9 and .1. w = softmax(.9, .1): e^.9 = 2.459603,
    # e^.1 = 1.105171, so .68997 and .31003. All of head 1's mass is on the target, none of head
    # 2's: m = .68997 * .9 = .62098 of .62098 + .31003 * .1 = .65198, so p = .95245.
    mass = torch.tensor([0.9, 0.1], dtype=torch.float64).view(1, 1, 1, 2)
    weight = sink_head_weight(mass)
    assert weight.flatten().tolist() == pytest.approx([0.68997, 0.31003], abs=5e-6)
    attention = torch.tensor([[0.9, 0.0], [0.0, 0.1]], dtype=torch.float64)
    m = weight.flatten() @ attention
    loss = map_kl(torch.tensor([1.0, 0.0], dtype=torch.float64), m, renormalise=True)
    assert math.exp(-loss) == pytest.approx(0.95245, abs=5e-6)
    # the same masses in two layers of one head each
    assert torch.equal(sink_head_weight(mass.view(1, 1, 2, 1)).flatten(), weight.flatten())
    # two queries of half these masses each count as one of the whole
    assert torch.equal(sink_head_weight(mass.expand(1, 2, 1, 2) / 2), weight)


def test_a_pattern_weighs_heads_by_their_distance_from_it():
    # Two query tokens. g = softmax(ln 3, 0) = (.75, .25). Head 1's masses (ln 3, 0) give the same:
    # KL 0; head 2's are equal: f = (.5, .5), KL = .75 ln 1.5 + .25 ln .5 = .130812.
    # w = (1, e^-.130812) / (1 + .877383) = (.532657, .467343).
    like = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    mass = torch.tensor([[math.log(3.0), 0.5], [0.0, 0.5]], dtype=torch.float64).view(1, 2, 1, 2)
    both = torch.ones(1, 2, dtype=torch.bool)
    wanted = [0.532657, 0.467343]
    found = pattern_head_weight(mass, like, both)
    assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-6)
    padded = pattern_head_weight(
        torch.cat((mass, torch.full((1, 1, 1, 2), 9.0)), 1),
        torch.cat((like, torch.tensor([[50.0]])), 1),
        torch.tensor([[True, True, False]]),
    )
    assert torch.equal(padded, found)
    none = pattern_head_weight(mass.requires_grad_(), like, ~both)
    assert none.isfinite().all()
    (gradient,) = torch.autograd.grad(none.square().sum(), mass)
    assert gradient.isfinite().all()


def test_the_query_tokens_most_like_the_image_are_taken():
    score = torch.tensor([[0.1, 3.0, 2.0, 9.0]])
    valid = torch.tensor([[True, True, True, False]])
    index, there = sink_queries(score, valid, 2)
    assert index.tolist() == [[1, 2]]
    index, there = sink_queries(score, valid, 50)
    assert sorted(index[there].tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="`most`"):
        sink_queries(score, valid, 0)


def test_likeness_is_a_sum_of_cosines():
    # q = (3, 4); image tokens (1, 0), (0, 2) and (-5, 0), the last of another image: .6 + .8
    queries = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    image = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-5.0, 0.0]]])
    own = torch.tensor([[[True, True, False]]])
    assert likeness(queries, image, own).item() == pytest.approx(1.4)
