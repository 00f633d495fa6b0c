"""Rows under the head: the fused call, any other head, hooks, label bags."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groundkern.hf.model.head import Smoothing, ragged_bags, score_rows
from groundkern.hf.model.logit_rule import BLOCKED, LogitRule

PLAIN = LogitRule(1.0, None)


class OtherLinear(nn.Linear):
    """A head with a forward of its own, as quantised and adapted ones have."""

    def forward(self, x):
        return super().forward(x)


def rows(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(9, 6, generator=generator)
    target = torch.tensor([3, 7, -100, 0, 12, 3, 5, 5, 9])
    ids = torch.tensor([[3, 4, 7], [5, -1, -1], [-1, -1, -1], [9, 2, -1]])
    index = torch.tensor([0, 0, 0, -1, 0, 1, 1, 2, 3])
    upstream = torch.randn(9, generator=generator)
    return hidden, target, Smoothing(ids, index, 0.3), upstream


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_any_head_scores_like_a_plain_one(softcap, bias):
    hidden, target, smoothing, upstream = rows()
    results = []
    for kind in (nn.Linear, OtherLinear):
        torch.manual_seed(3)
        head = kind(6, 13, bias=bias)
        x = hidden.clone().requires_grad_()
        scores = score_rows(
            head, x, target, smoothing=smoothing, rule=LogitRule(1.0, softcap), backend="auto"
        )
        (scores.loss * upstream).sum().backward()
        results.append((*scores, x.grad, *(p.grad for p in head.parameters())))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-6)
    loss, log_prob, predicted = results[0][:3]
    assert loss[2] == log_prob[2] == 0
    assert predicted[2] == -1
    others = torch.tensor([True, True, False, False, True, True, False, False, True])
    assert torch.equal(loss != -log_prob, others)  # smoothed where the bag holds another label


@pytest.mark.parametrize("kind", [nn.Linear, OtherLinear])
def test_ids_that_are_left_out_have_no_share(kind):
    """As Chameleon's forward does with image tokens: the others' probabilities add up to 1."""
    hidden, target, smoothing, upstream = rows()
    offset = torch.zeros(13)
    offset[[1, 6, 11]] = BLOCKED
    rule = LogitRule(1.0, None, offset)
    torch.manual_seed(3)
    head = kind(6, 13, bias=False)
    smoothing = smoothing._replace(share=0.0)
    scores = score_rows(head, hidden, target, smoothing=smoothing, rule=rule, backend="auto")
    (scores.loss * upstream).sum().backward()
    kept = [i for i in range(13) if not offset[i]]
    log_probs = (hidden @ head.weight.detach().T)[:, kept].log_softmax(-1)
    counted = target >= 0
    wanted = [log_probs[n, kept.index(int(t))] for n, t in enumerate(target) if t >= 0]
    torch.testing.assert_close(scores.log_prob[counted], torch.stack(wanted))
    assert not head.weight.grad[offset < 0].any()


def test_hooks_run_and_the_forward_is_put_back():
    """Sharded training gathers the weight in the head's own hooks."""
    hidden, target, smoothing, _ = rows()
    head, seen = nn.Linear(6, 13), []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    score_rows(head, hidden, target, smoothing=smoothing, rule=PLAIN, backend="auto")
    assert seen == [(9, 6)]
    assert "forward" not in vars(head)
    with pytest.raises(ValueError):
        score_rows(head, hidden, target + 13, smoothing=smoothing, rule=PLAIN, backend="auto")
    assert "forward" not in vars(head)


def test_a_forward_of_the_instance_is_respected():
    """Offloading replaces a module's forward to bring its weight: it must be called."""
    hidden, target, smoothing, _ = rows()
    head = nn.Linear(6, 13)
    wanted = score_rows(head, hidden, target, smoothing=smoothing, rule=PLAIN, backend="auto")
    own, calls = head.forward, []
    head.forward = lambda x: (calls.append(1), own(x))[1]
    scores = score_rows(head, hidden, target, smoothing=smoothing, rule=PLAIN, backend="auto")
    assert calls == [1]
    assert "forward" in vars(head)
    torch.testing.assert_close(scores.loss, wanted.loss, rtol=1e-5, atol=1e-6)


def test_padded_bags_become_ragged_ones():
    ids = torch.tensor([[3, -1, 8], [-1, -1, -1], [5, 6, 7]])
    bags = ragged_bags(ids, torch.tensor([2, 0, -1]))
    assert bags.offsets.tolist() == [0, 2, 2, 5]
    assert bags.ids[:5].tolist() == [3, 8, 5, 6, 7]
    empty = ragged_bags(ids[:, :0], torch.tensor([-1]))
    assert empty.offsets.tolist() == [0, 0, 0, 0]
