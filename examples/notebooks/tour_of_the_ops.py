# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of the ops
#
# groundkern computes what grounding methods need from a few *query rows* and a few *counted rows*,
# without storing attention probabilities or logits. This notebook calls each op on tensors small
# enough to draw. It needs torch and matplotlib, no model and no GPU.

# %%
import resource

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import groundkern as gk

torch.manual_seed(0)
plt.rcParams.update({"figure.dpi": 60, "image.cmap": "magma", "font.size": 12})

# %% [markdown]
# ## A sequence with an image in it
#
# Four tokens of a prompt, an image of 12 x 16 visual tokens, and 20 tokens of a question and its
# answer: 216 in all. A real layer hands us `q`, `k` and `v`; here we make them up, so that keys of
# neighbouring visual tokens are alike, as they are in a real image.

# %%
height, width = 12, 16
first, image_tokens, heads, kv_heads, dim = 4, height * width, 8, 2, 32
length = first + image_tokens + 20

k = torch.randn(1, kv_heads, length, dim)
smooth = F.interpolate(torch.randn(kv_heads, dim, 3, 4), (height, width), mode="bicubic")
k[:, :, first : first + image_tokens] = 2 * smooth.flatten(2).mT
v = torch.randn(1, kv_heads, length, dim)
q = torch.randn(1, heads, length, dim)
q = 0.3 * q + q.mean(1, keepdim=True)  # heads agree a little

# %% [markdown]
# ## Rows: which queries are looked at
#
# Grounding losses are about few tokens: those of the answer that speak of a region. `QueryRows`
# names them, and which keys each one sees. Under a causal mask these are the keys up to itself.

# %%
positions = torch.tensor([204, 208, 212])
rows = gk.QueryRows.causal(torch.zeros(3), positions)
print("each row sees keys", list(zip(rows.start.tolist(), rows.stop.tolist(), strict=True)))

# %% [markdown]
# ## Where a row looks: `attention_map`
#
# The mean attention of all heads on some columns, here the visual tokens. `over="columns"`
# normalises over these columns, `over="visible"` over all that the row sees.

# %%
columns = torch.arange(first, first + image_tokens, dtype=torch.int32)[None]
maps = gk.attention_map(rows.take(q), k, rows, columns, over="columns")  # [3, 192]

figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for axis, values, position in zip(axes, maps, positions.tolist(), strict=True):
    shown = axis.imshow(values.view(height, width), vmin=0, vmax=float(maps.max()))
    axis.set(title=f"row at position {position}", xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, label="attention")
plt.show()

# %% [markdown]
# It is the softmax that you would write, from far less memory: plain attention of this layer
# stores a probability for each head, query and key.

# %%
scores = q[0, :, positions] @ k[0].repeat_interleave(heads // kv_heads, 0).mT / dim**0.5
plain = scores[..., columns[0].long()].softmax(-1).mean(0)
print("largest difference", f"{float((plain - maps).abs().max()):.0e}")
print("numbers in eager attention:", heads * length * length, "- in the maps:", maps.numel())

# %% [markdown]
# ## Allowed keys: `KeySets`
#
# SMAM asks what the model would answer if of the image it saw *the right region alone*. That is a
# set of allowed keys: all that is not the image, and the region. Sets are bit masks, one for each
# region and not one for each row.

# %%
region = torch.zeros(height, width, dtype=torch.bool)
region[3:7, 9:14] = True
visual, inside = (torch.zeros(1, length, dtype=torch.bool) for _ in range(2))
visual[:, first : first + image_tokens] = True
inside[0, first : first + image_tokens] = region.flatten()
of_row = torch.tensor([0, 0, -1], dtype=torch.int32)  # the last row is not restricted
sets = gk.KeySets.regions(visual, inside, torch.tensor([0]), of_row)

keys = torch.arange(length)
visible = keys < rows.stop[:, None]
allowed = visible & (~visual | inside | (of_row[:, None] < 0))
figure, axes = plt.subplots(3, 1, figsize=(11, 2.6), layout="constrained", sharex=True)
for axis, seen, used, number in zip(axes, visible, allowed, of_row.tolist(), strict=True):
    axis.imshow((seen.int() + used.int())[None], aspect="auto", cmap="Blues", vmin=0, vmax=2)
    axis.set(yticks=[], ylabel=f"set {number}" if number >= 0 else "none")
axes[0].set_title("white: not visible, light: visible but not allowed, dark: allowed")
axes[-1].set_xlabel("key")
plt.show()

# %% [markdown]
# ## Side attention: `side_attention`
#
# Attention of the rows over their allowed keys, as the layer's own attention but for the set. Its
# log-sum-exp is returned too: the difference to the unrestricted one is the *region mass*, the
# share of the row's attention that lies on allowed keys.

# %%
free = gk.side_attention(rows.take(q), k, v, rows)
side = gk.side_attention(rows.take(q), k, v, rows, allowed=sets)  # out [3, 8, 32], lse [3, 8]
mass = (side.lse - free.lse).exp()

figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
axes[0].imshow(free.out[0], cmap="coolwarm", vmin=-1, vmax=1, aspect="auto")
axes[0].set(title="row 204, whole image", xlabel="dimension", ylabel="head")
axes[1].imshow(side.out[0], cmap="coolwarm", vmin=-1, vmax=1, aspect="auto")
axes[1].set(title="row 204, region alone", xlabel="dimension")
axes[2].bar(range(heads), mass[0])
axes[2].set(title="region mass", xlabel="head", ylim=(0, 1))
plt.show()

mask = allowed[None, None]
plain = F.scaled_dot_product_attention(q[:, :, positions], k, v, mask, enable_gqa=True)
gap = float((plain[0].transpose(0, 1) - side.out).abs().max())
print("largest difference from torch's", f"{gap:.0e}")
print("mass of the row without a set:", mass[2].mean().item())

# %% [markdown]
# ## Teach a map: `attention_kl`
#
# KLAL pulls the attention of a row towards a target over the visual tokens. `maps.target_map` makes
# targets of boxes, points, polygons and masks; the KL is computed in log space, so it does not
# underflow where the attention is tiny. Here we train the query projection of one layer.

# %% figure="example_attention_kl.png"
rects = gk.maps.patch_grid(height, width)  # each visual token's place in the image
box = [[9 / width, 3 / height, 14 / width, 7 / height]]
target = gk.maps.target_map(rects, boxes=box, kind="gaussian").expand(3, -1)

projection = torch.eye(dim).repeat(heads, 1, 1).requires_grad_()
optimizer = torch.optim.Adam([projection], lr=0.03)
losses, seen = [], {}
for step in range(61):
    queries = torch.einsum("nhd,hde->nhe", rows.take(q), projection)
    loss = gk.attention_kl(queries, k, target, rows, columns, over="columns").mean()
    if step in (0, 15, 60):
        with torch.no_grad():
            seen[step] = gk.attention_map(queries, k, rows, columns, over="columns")[0]
    losses.append(float(loss.detach()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

figure, axes = plt.subplots(1, 5, figsize=(15, 2.8), layout="constrained")
axes[0].plot(losses)
axes[0].set(title="KL", xlabel="step", ylim=(0, None))
pictures = {"target": target[0], **{f"step {step}": x for step, x in seen.items()}}
for axis, (title, values) in zip(axes[1:], pictures.items(), strict=True):
    axis.imshow(values.view(height, width), vmin=0)
    axis.set(title=title, xticks=[], yticks=[])
plt.show()
print(f"KL {losses[0]:.2f} at the start, {losses[-1]:.2f} after 60 steps")

# %% [markdown]
# ## A loss without logits: `linear_cross_entropy`
#
# DV-SFT gives visual tokens labels, so that many more rows than the answer's go through the head.
# The logits of 512 rows over Qwen2.5's 151,936 tokens are 297 MiB in fp32, and eager autograd holds
# three such tensors at its peak. The op makes them a piece at a time, within a budget that you set,
# and returns the same loss and gradients.

# %%
hidden = torch.randn(512, 64, requires_grad=True)
head = (torch.randn(151_936, 64) / 8).requires_grad_()
labels = torch.randint(len(head), (512,))


def peak():
    """The most memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


start = peak()
ours = gk.linear_cross_entropy(hidden, head, labels).loss
our_gradients = torch.autograd.grad(ours, (hidden, head))
fused = peak() - start
theirs = F.cross_entropy(hidden @ head.T, labels)
gradients = torch.autograd.grad(theirs, (hidden, head))
plain = peak() - start

print(f"loss {ours:.5f}, with logits {theirs:.5f}")
for name, x, y in zip(("hidden", "head"), our_gradients, gradients, strict=True):
    print(f"gradient of {name}: differs by {float((x - y).abs().max() / y.abs().max()):.0e}")

figure, axis = plt.subplots(figsize=(7, 1.8), layout="constrained")
bars = axis.barh(["with logits", "linear_cross_entropy"], [plain, fused], color=["0.6", "C0"])
axis.bar_label(bars, fmt="{:.0f} MiB", padding=4)
axis.set(title="memory at the peak, forward and backward", xlim=(0, 1.2 * plain))
plt.show()

# %% [markdown]
# The budget on a CPU is 64 MiB (`groundkern.set_logit_budget`). A part of our peak is the gradient
# of the head itself, 37 MiB, which both have.
#
# ## Where to go on
#
# - *From a receipt to a grounded model*, the other notebook, uses these ops by way of
#   `groundkern.hf.attach` on a vision-language model.
# - `examples/raw_ops.py` is the shortest form of this page, and `examples/bare_loop.py` a training
#   loop.
# - docs/concepts.md explains rows, keys and sets; docs/ops/kernels.md how the kernels work.
