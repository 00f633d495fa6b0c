"""What BASIC takes of a model: how many layers teach, and the embeddings of (B3)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from groundkern.checks import fail
from groundkern.hf.model.layers import text_attention, text_decoder
from groundkern.hf.model.prefix import is_prefix_lm
from groundkern.hf.objectives import Basic


def basic_depth(model: PreTrainedModel, how: Basic) -> int:
    """k of (B1).

    Args:
        model: without wrappers.
        how: the objective.

    Returns:
        The layers whose outputs teach: half of all, if it is not said.
    """
    return how.depth or model.config.get_text_config().num_hidden_layers // 2


def basic_table(model: PreTrainedModel, how: Basic) -> nn.Module:
    """The module whose weight is E of (B3).

    Args:
        model: without wrappers.
        how: the objective.

    Returns:
        The input embeddings or the output head.

    Raises:
        ValueError: one with an adapter, quantised, or with another forward than its class's.
    """
    of_input = how.head == "input"
    table = model.get_input_embeddings() if of_input else model.get_output_embeddings()
    kind = nn.Embedding if of_input else nn.Linear
    plain = isinstance(table, kind) and table.weight.is_floating_point()
    if not plain or "forward" in table.__dict__:
        fail("basic.head", f"a plain {kind.__name__} for (B3)", type(table).__name__)
    return table


def refuse_frozen(model: PreTrainedModel, how: Basic) -> None:
    """Raise if nothing that trains can learn from BASIC, whose loss would stand still.

    Args:
        model: without wrappers, in training.
        how: the objective.

    Raises:
        ValueError: projector and tower are frozen, and E has no gradient.
    """
    decoder = {id(p) for p in text_decoder(model).parameters()}
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    decoder |= {id(p) for table in tables for p in table.parameters()}
    others = [p for p in model.parameters() if id(p) not in decoder]
    learns = any(p.requires_grad for p in others)
    if not others:  # image tokens of the vocabulary (Chameleon)
        learns = any(p.requires_grad for p in tables[0].parameters())
    if how.logits and not how.detach_head:
        learns = learns or basic_table(model, how).weight.requires_grad
    if not learns:
        wanted = "a projector or a vision tower that trains: it teaches nothing else"
        fail("basic", wanted, "frozen ones")


def refuse_basic(model: PreTrainedModel, how: Basic) -> None:
    """Raise for a model that cannot be trained with BASIC.

    Args:
        model: without wrappers.
        how: the objective.

    Raises:
        ValueError: no list of layers, several streams of hidden states, too many layers asked for;
            no attention to be read, or text that sees later tokens; `basic_table`.
    """
    name, layers = type(model).__name__, getattr(text_decoder(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        fail("basic", "a decoder with a list of layers", f"{name}, which has none")
    if getattr(model.config.get_text_config(), "altup_num_inputs", None):  # Gemma3n
        fail("basic", "a decoder with one stream of hidden states", f"{name}, which has several")
    depth = basic_depth(model, how)
    if not 1 <= depth < len(layers):
        fail("basic.depth", f"a number in [1, {len(layers)}), below the last layer", depth)
    if how.patches == "attention":
        if not any(number < depth for number in text_attention(model)):
            wanted = "layers of softmax attention among the first (or patches: uniform)"
            fail("basic", wanted, f"{name} with none among {depth}")
        if is_prefix_lm(model):
            wanted = "text tokens that see no later ones (or patches: uniform)"
            fail("basic", wanted, f"{name}, whose prompt does")
    if how.logits:
        basic_table(model, how)
