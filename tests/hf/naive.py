"""The grounded forward written out: eager attention, full logits, sample by sample.

An oracle for the tests: the decoder is written out layer by layer on the model's own weights, so
padding, packing of rows, side tokens and the fused ops all have a plain counterpart.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from groundkern.hf import DvSft, Klal, Smam


@dataclass
class NaiveOutput:
    """Loss and parts as in `GroundedOutput`; rows as lists in the batch's order, unpadded."""

    loss: Tensor
    parts: dict[str, Tensor]
    text_log_prob: list[Tensor]
    side_log_prob: list[Tensor]
    contributions: list[Tensor]


def naive_forward(
    model, batch: dict, *, smam: Smam, dv_sft: DvSft, klal: Klal, remember: bool = False
) -> NaiveOutput:
    """All terms of a batch, and with `remember` the contributions of the aligned rows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text, words, grounding, cross_entropy, kl, contributions = ([] for _ in range(6))
    side_log_prob = []
    counts = {kind: int((batch[f"gk_{kind}_weight"] != 0).sum()) for kind in ("word", "map")}
    for sample in run_samples(base, batch):
        log_probs = sample.log_probs(sample.main)
        text += [log_probs[t, sample.ids[t + 1]] for t in sample.positions("text")]
        words += sample.weighted("word", sample.word_losses(log_probs, dv_sft.smoothing))
        for n, t in enumerate(sample.positions("side")):
            w = sample.ids[t + 1]
            plus = sample.log_probs(sample.side[n])[w]
            side_log_prob.append(plus)
            reference = plus.detach() if smam.detach_reference else plus
            weight = batch["gk_side_weight"][sample.b, n]
            grounding.append(-weight * F.logsigmoid(smam.beta * (log_probs[t, w] - reference)))
            cross_entropy.append(-weight * plus)
            if remember:
                contributions.append(sample.contribution(t, w))
        divergences = [sample.map_kl(r, klal) for r in range(len(sample.positions("map")))]
        kl += sample.weighted("map", divergences)
    texts, zero = len(text), text[0] * 0.0
    parts = {
        "text": -sum(text, zero) / texts,
        "word": sum(words, zero) / max(1, counts["word"]),
        "smam_grounding": sum(grounding, zero) / texts,
        "smam_cross_entropy": sum(cross_entropy, zero) / texts,
        "map_kl": sum(kl, zero) / max(1, counts["map"]),
    }
    loss = parts["text"] + dv_sft.weight * parts["word"] + klal.weight * parts["map_kl"]
    loss = loss + smam.weight * smam.gamma * parts["smam_grounding"]
    loss = loss + smam.weight * smam.alpha * parts["smam_cross_entropy"]
    return NaiveOutput(loss, parts, text, side_log_prob, contributions)


def run_samples(model, batch: dict) -> list[_Sample]:
    """Every sample of a batch run through the decoder, without its padding."""
    embedded, (cos, sin) = _decoder_input(model, batch)
    samples = []
    for b in range(len(embedded)):
        attended = batch["attention_mask"][b].bool()
        first = int(attended.int().argmax())
        streams = (x[b, attended] for x in (embedded, cos, sin))
        samples.append(_Sample(model, batch, b, first, *streams))
    return samples


def _decoder_input(model, batch: dict) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Embeddings with images in place [B, S, D], and the rotary cos and sin [B, S, head]."""
    seen = {}

    def hook(_, args, kwargs):
        seen.update(hidden=args[0], rotary=kwargs["position_embeddings"])

    handle = model.get_decoder().layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    model.base_model(**{k: v for k, v in batch.items() if not k.startswith("gk_")})
    handle.remove()

    def mixed(x: Tensor) -> Tensor:
        if x.dim() == 4:  # older transformers mix mrope's axes [3, B, S, head] in the attention
            sections = list(model.config.get_text_config().rope_parameters["mrope_section"]) * 2
            x = torch.cat([m[i % 3] for i, m in enumerate(x.split(sections, -1))], -1)
        return x.expand(len(seen["hidden"]), -1, -1)

    cos, sin = map(mixed, seen["rotary"])
    return seen["hidden"], (cos, sin)


class _Sample:
    """One sample of a batch run through the decoder: main and side streams, every attention."""

    def __init__(self, model, batch: dict, b: int, first: int, hidden, cos, sin) -> None:
        self.model, self.batch, self.b, self.first = model, batch, b, first
        length = len(hidden)
        self.ids = batch["input_ids"][b, first : first + length]
        self.image = batch["gk_image"][b, first : first + length]
        self.decoder = model.get_decoder()
        self.layers = []  # (attention [H, S, S], v [S, H, D], o_proj) of each layer
        self.hidden = []  # [S, D] behind each layer
        side = [hidden[t] for t in self.positions("side")]
        blocked = [self._blocked(n, length) for n in range(len(side))]
        for layer in self.decoder.layers:
            hidden, side = self._layer(layer, hidden, side, blocked, cos, sin)
            self.hidden.append(hidden)
        self.residual = hidden
        self.main = self.decoder.norm(hidden)
        self.side = [self.decoder.norm(x) for x in side]

    def positions(self, kind: str) -> list[int]:
        rows = self.batch[f"gk_{kind}_position"][self.b].tolist()
        return [row - self.first for row in rows if row >= 0]

    def weighted(self, kind: str, losses: list[Tensor]) -> list[Tensor]:
        """Each row's loss times its weight (W1)."""
        weights = self.batch[f"gk_{kind}_weight"][self.b].tolist()
        return [weight * loss for weight, loss in zip(weights, losses)]

    def _blocked(self, n: int, length: int) -> Tensor:
        """bool [S]: the visual keys outside the n-th aligned row's regions (S1)."""
        inside = self.batch["gk_side_inside"][self.b, self.batch["gk_side_set"][self.b, n]]
        return (self.image >= 0) & ~inside[self.first : self.first + length]

    def _layer(self, layer, hidden, side, blocked, cos, sin):
        attention = layer.self_attn
        x, length, size = layer.input_layernorm(hidden), len(hidden), attention.head_dim
        q, k, v = (
            p(x).view(1, length, -1, size).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        own = sys.modules[type(attention).__module__]
        rotate = getattr(own, "apply_rotary_pos_emb", apply_rotary_pos_emb)
        q, k = rotate(q, k, cos[None], sin[None])
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2))[0] * size**-0.5  # [H, S, S]
        future = torch.ones(length, length).triu(1).bool()
        a = scores.masked_fill(future, -torch.inf).softmax(-1)
        self.layers.append((a, v[0].transpose(0, 1), attention.o_proj))
        main = self._rest(layer, hidden, (a @ v[0]).transpose(0, 1).flatten(1))
        new_side = []
        for x, t, block in zip(side, self.positions("side"), blocked, strict=True):
            own = scores[:, t].masked_fill(future[t] | block, -torch.inf).softmax(-1)  # [H, S]
            z = torch.einsum("hs,hsd->hd", own, v[0]).flatten()
            new_side.append(self._rest(layer, x[None], z[None])[0])
        return main, new_side

    def _rest(self, layer, hidden, z):
        y = hidden + layer.self_attn.o_proj(z)
        return y + layer.mlp(layer.post_attention_layernorm(y))

    def log_probs(self, x: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(x)
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    def word_losses(self, log_probs: Tensor, b: float) -> list[Tensor]:
        """(D3) of each labelled visual token, (D5) if it has several labels."""
        losses = []
        labels = self.batch["gk_word_label"][self.b].tolist()
        several = (self.batch[f"gk_several_{x}"][self.b].tolist() for x in ("label", "weight"))
        several = [[(y, w) for y, w in zip(*row, strict=True) if y >= 0] for row in zip(*several)]
        for n, i in enumerate(self.positions("word")):
            bag = self.batch["gk_word_bag"][self.b, self.image[i]].tolist()
            weights = several[n] or [(labels[n], 1)]
            others = [y for y in bag if y >= 0 and y not in dict(weights)]
            own = sum(w * log_probs[i, y] for y, w in weights) / sum(w for _, w in weights)
            share = b if others else 0.0
            other = sum(log_probs[i, y] for y in others) / max(1, len(others))
            losses.append(-((1 - share) * own + share * other))
        return losses

    def map_kl(self, r: int, klal: Klal) -> Tensor:
        """(K1)-(K3) of the r-th map row."""
        t = self.positions("map")[r]
        number = int(self.batch["gk_map_image"][self.b, r])
        columns = self.batch["gk_map_columns"][self.b].tolist()
        own = [c - self.first for c in columns if c >= 0]
        target = self.batch["gk_map_target"][self.b, r, : len(own)].float()
        inside = torch.tensor([int(self.image[c]) == number for c in own])
        p = target[inside] / target[inside].sum()
        terms = []
        for number_of, (a, _, _) in enumerate(self.layers):
            if klal.layers is not None and number_of not in klal.layers:
                continue
            heads = a[:, t, own][:, inside]  # [H, columns]
            if klal.over == "columns":
                heads = heads / heads.sum(-1, keepdim=True)
            q = heads.mean(0, keepdim=True) if klal.heads == "mean" else heads
            terms.append((torch.xlogy(p, p) - p * q.log()).sum(-1).mean())
        return sum(terms) / len(terms)

    def contribution(self, t: int, w: Tensor) -> Tensor:
        """(C1) on every visual token, with g = W_O^T (u_w * norm_weight / RMS)."""
        norm = self.decoder.norm
        rms = (self.residual[t].square().mean() + norm.variance_epsilon).sqrt()
        direction = self.model.get_output_embeddings().weight[w] * norm.weight / rms
        visual = self.image >= 0
        total = 0.0
        for a, v, o_proj in self.layers:
            g = (direction @ o_proj.weight).view(v.shape[1:])  # [H, D]
            total = total + torch.einsum("hs,shd,hd->s", a[:, t], v, g)[visual]
        return total
