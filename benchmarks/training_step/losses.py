"""The losses of the training step's contestants: what people write today, and ours."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

SKIPPING = "SFT skipping logits"
EAGER = "SFT + KLAL, output_attentions"
REPROJECTED = "SFT + KLAL, keys projected again"
OURS = {
    "groundkern, text only": (),
    "groundkern, SMAM": ("side",),
    "groundkern, DV-SFT": ("word",),
    "groundkern, KLAL": ("map",),
    "groundkern, all": ("side", "word", "map"),
}
NAMES = ("stock SFT", SKIPPING, EAGER, REPROJECTED, *OURS)
# Contestant -> another that must have the same loss and gradients.
EQUALS = {
    "stock SFT": SKIPPING,
    "groundkern, text only": SKIPPING,
    EAGER: "groundkern, KLAL",
    REPROJECTED: "groundkern, KLAL",
}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The loss of each contestant, by name; EAGER's must run inside `eager_attention`."""
    plain = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    text = batch["gk_text_position"][0].long()
    answer = batch["input_ids"][0, text + 1]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    body_inputs = {name: x for name, x in plain.items() if name != "labels"}

    def stock() -> Tensor:
        return model(**plain, use_cache=False).loss

    def skipping() -> Tensor:
        hidden = base.base_model(**body_inputs, use_cache=False)[0]
        return F.cross_entropy(base.get_output_embeddings()(hidden[0, text]).float(), answer)

    def eager() -> Tensor:
        output = model(**plain, use_cache=False, output_attentions=True)
        position = batch["gk_map_position"][0].long()
        return output.loss + mean_kl((a[0][:, position] for a in output.attentions), batch)

    def reprojected() -> Tensor:
        with _attention_inputs(base) as seen:
            loss = skipping()
        return loss + mean_kl((_row_attention(*x, batch) for x in seen), batch)

    def ours(kinds: tuple[str, ...]) -> Callable[[], Tensor]:
        left_out = tuple(f"gk_{kind}_" for kind in ("side", "word", "map") if kind not in kinds)
        inputs = {name: x for name, x in batch.items() if not name.startswith(left_out)}
        return lambda: model(**inputs).loss

    return {
        "stock SFT": stock,
        SKIPPING: skipping,
        EAGER: eager,
        REPROJECTED: reprojected,
        **{name: ours(kinds) for name, kinds in OURS.items()},
    }


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention that materialises its probabilities, in the decoder only."""
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


@contextlib.contextmanager
def _attention_inputs(model: nn.Module) -> Iterator[list[tuple]]:
    """Collects (attention module, its input [1, S, D], rotary cosines and sines) of every decoder
    layer."""
    seen: list[tuple] = []

    def note(module: nn.Module, positional: tuple, named: dict) -> None:
        seen.append((module, named["hidden_states"], named["position_embeddings"]))

    layers = model.get_decoder().layers
    hooks = [x.self_attn.register_forward_pre_hook(note, with_kwargs=True) for x in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _row_attention(
    module: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], batch: dict[str, Tensor]
) -> Tensor:
    """[H, N, S]: the rows' probabilities, from q and k projected a second time, as GUI-AIMA does
    beside an attention that does not return them."""
    position = batch["gk_map_position"][0].long()
    heads = lambda x: x.view(1, x.shape[1], -1, module.head_dim).transpose(1, 2)  # noqa: E731
    q, k = heads(module.q_proj(hidden[:, position])), heads(module.k_proj(hidden))
    cos, sin = rotary
    q = qwen.apply_rotary_pos_emb(q, q, cos[:, position], sin[:, position])[0]
    k = qwen.apply_rotary_pos_emb(k, k, cos, sin)[1]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = (q @ k.transpose(2, 3))[0].float() * module.scaling  # [H, N, S]
    later = torch.arange(hidden.shape[1], device=s.device) > position[:, None]
    return s.masked_fill(later, -torch.inf).softmax(-1)


def mean_kl(rows_of_layers: Iterator[Tensor], batch: dict[str, Tensor]) -> Tensor:
    """(K1) to (K3) written out, from the rows' probabilities [H, N, S] in every layer."""
    columns = batch["gk_map_columns"][0].long()
    target = batch["gk_map_target"][0].float()
    target = target / target.sum(-1, keepdim=True)  # [N, C]
    terms = []
    for rows in rows_of_layers:
        a = rows[:, :, columns].float()  # [H, N, C]
        q = (a / a.sum(-1, keepdim=True)).mean(0)
        terms.append((target * (target.log() - q.log())).sum(-1).mean())
    return torch.stack(terms).mean()
