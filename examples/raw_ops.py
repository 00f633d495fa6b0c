"""Three ops on plain tensors, each beside the torch expression that it replaces.

python examples/raw_ops.py
"""

import torch
import torch.nn.functional as F

import groundkern as gk

torch.manual_seed(0)
heads, kv_heads, length, dim = 8, 2, 512, 64
q = torch.randn(1, heads, length, dim, requires_grad=True)
k, v = (torch.randn(1, kv_heads, length, dim, requires_grad=True) for _ in range(2))

# Three tokens of the answer, the image's tokens, and those of them inside the region.
positions = torch.tensor([480, 495, 511])
rows = gk.QueryRows.causal(torch.zeros(3), positions)
image = torch.zeros(1, length, dtype=torch.bool)
image[:, 16:400] = True
region = torch.zeros(1, length, dtype=torch.bool)
region[:, 100:120] = True
visible = torch.arange(length) <= positions[:, None]


def compare(name, ours, theirs, x):
    """Print two losses, and how far their gradients of x are from one another."""
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)]
    gap = float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())
    print(f"{name}: {ours:.5f}, torch {theirs:.5f}, gradients differ by {gap:.0e}")


# Side attention: what the rows would see if of the image they saw the region alone.
sets = gk.KeySets.regions(image, region, torch.tensor([0]), torch.zeros(3, dtype=torch.int32))
ours = gk.side_attention(rows.take(q), k, v, rows, allowed=sets).out  # [3, heads, dim]
mask = visible & (region | ~image)
theirs = F.scaled_dot_product_attention(q[:, :, positions], k, v, mask, enable_gqa=True)
compare("side attention", ours.square().mean(), theirs.square().mean(), k)

# Attention KL: from a target map over the image to the mean attention of all heads.
columns = torch.arange(16, 400, dtype=torch.int32)[None]
target = torch.zeros(3, 384)
target[:, 100 - 16 : 120 - 16] = 1 / 20
ours = gk.attention_kl(rows.take(q), k, target, rows, columns, over="columns")  # [3]
scores = q[0, :, positions] @ k[0].repeat_interleave(heads // kv_heads, 0).mT / dim**0.5
attention = scores[..., 16:400].softmax(-1).mean(0)  # [3, 384]
theirs = F.kl_div(attention.log(), target, reduction="none").sum(-1)
compare("attention KL", ours.mean(), theirs.mean(), k)

# Linear cross entropy: the loss of a head without its logits.
hidden = torch.randn(1024, 256, requires_grad=True)
weight, labels = torch.randn(32_000, 256) / 16, torch.randint(32_000, (1024,))
ours = gk.linear_cross_entropy(hidden, weight, labels).loss
theirs = F.cross_entropy(hidden @ weight.T, labels)
compare("linear cross entropy", ours, theirs, hidden)
