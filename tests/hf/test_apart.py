"""Torch's attention of packed rows: one call for each document, equal to one call with a mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from groundkern.hf.model.apart import attend_apart
from groundkern.hf.model.documents import Documents

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]])
LENGTHS = [[4, 3, 1], [2, 6]]


class Attention(nn.Module):
    is_causal, num_key_value_groups = True, 2


def causal(documents: Documents) -> torch.Tensor:
    """bool [R, 1, S, S]."""
    same = documents.number[:, :, None] == documents.number[:, None]
    return (same & torch.ones_like(same).tril())[:, None]


@pytest.mark.parametrize("how", ["plain", "mask", "window"])
def test_it_is_what_one_call_with_a_mask_returns(how):
    documents = Documents(POSITIONS)
    assert documents.row_lengths == LENGTHS
    mask = causal(documents)
    if how == "window":
        place = torch.arange(8)
        mask = mask & (place[:, None] - place < 2)
    assert documents.refuse_leak(mask) == (how != "window")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 8, 16, requires_grad=True) for h in (4, 2, 2))
    seen = []

    def attention(module, query, key, value, own, **kwargs):
        seen.append(key.shape[2])
        return sdpa_attention_forward(module, query, key, value, own, **kwargs)

    own = None if how == "plain" else mask
    found = attend_apart(attention, Attention(), (q, k, v), own, documents, {}, saved=True)
    whole, _ = sdpa_attention_forward(Attention(), q, k, v, mask)
    assert seen == [4, 3, 1, 2, 6]
    torch.testing.assert_close(found.out, whole)
    upstream = torch.randn_like(whole)
    wanted = torch.autograd.grad(whole, (q, k, v), upstream)
    for ours, theirs in zip(torch.autograd.grad(found.out, (q, k, v), upstream), wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if found.lse is not None:
        scores = q @ k.repeat_interleave(2, 1).mT / 4
        lse = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)
        torch.testing.assert_close(found.lse, lse.detach())
    assert (found.lse is not None) == (how == "plain")
