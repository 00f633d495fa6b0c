"""Tokens that see later keys: the prefix of a prefix-LM, and image tokens that see their image.

Rows of maps and side tokens are described by the keys up to their own place. A row that sees later
ones is refused; hidden states of such tokens may be read (DV-SFT, the logit lens).
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from groundkern import checks
from groundkern.checks import fail
from groundkern.hf.data.batch import GroundedBatch
from groundkern.hf.data.image_token import one_of
from groundkern.hf.model.documents import Documents
from groundkern.hf.model.layers import forward_source

# Their masks let tokens of type 0 (image and prompt) see one another; others are causal.
PREFIX_LMS = ("paligemma",)
CAUSAL_TYPE = 1  # of their `token_type_ids`
# rows whose keys are those up to their own place
_DESCRIBED = (
    *("side_position", "map_position", "phrase_position", "policy_position", "query_position"),
)


def is_prefix_lm(model: nn.Module) -> bool:
    """Whether image and prompt attend both ways, by `token_type_ids`.

    Args:
        model: a transformers model without wrappers.

    Returns:
        True for PaliGemma.
    """
    return model.config.model_type in PREFIX_LMS


def side_token_type(model: nn.Module) -> int:
    """The `token_type_ids` of side tokens, of which no main token may become aware.

    Args:
        model: the attached model, without wrappers.

    Returns:
        The type of causal text.
    """
    return CAUSAL_TYPE if is_prefix_lm(model) else 0


def unbounded_rows(model: nn.Module, inputs: dict, position: Tensor) -> Tensor | None:
    """Which rows see their whole prefix, past any sliding window.

    Args:
        model: the attached model, without wrappers.
        inputs: of the model's body.
        position: [B, R], padded with -1.

    Returns:
        bool [B, R]: the rows of the prefix; None if the model has none.
    """
    if not is_prefix_lm(model):
        return None
    return inputs["token_type_ids"].gather(1, position.clamp(min=0).long()) == 0


def refuse_seeing_rows(
    model: nn.Module,
    batch: GroundedBatch,
    inputs: dict,
    visual: Collection[int],
    documents: Documents | None,
) -> None:
    """Refuse rows that see later keys, where a causal description of them would be wrong.

    Args:
        model: the attached model, without wrappers.
        batch: the batch's supervision.
        inputs: what is left for the model's body.
        visual: the ids of visual tokens.
        documents: of packed rows.

    Raises:
        ValueError: a prefix-LM without `token_type_ids`; a row of text, aligned tokens, maps,
            phrases, policies or queries inside the prefix; one of these but text that is of an
            image; images of two documents side by side, which would be one (all but the first are
            checked if that needs no sync).
    """
    types = inputs.get("token_type_ids")
    if is_prefix_lm(model):
        if types is None:
            wanted = "0 for image and prompt, 1 for the answer: without them all attend both ways"
            fail("token_type_ids", wanted, "nothing")
        _refuse_prefix_rows(batch, types, inputs.get("attention_mask"))
    elif types is not None or "block_sequence_ids" in forward_source(type(model.base_model)):
        of_image = one_of(inputs["input_ids"], visual)
        for kinds in (types, inputs.get("mm_token_type_ids")):
            if kinds is not None:  # Molmo2's markers and line ends see later tokens too
                of_image = of_image | (kinds == 1) | (kinds == 2)
        _refuse_image_rows(batch, of_image)
        if documents is not None and checks.values_visible(of_image):
            beside = of_image[:, 1:] & of_image[:, :-1] & documents.new[:, 1:]
            got = "an image at the end of one and the start of the next"
            wanted = "documents whose images are apart, since tokens of an image see one another"
            checks.require(not bool(beside.any()), "position_ids", wanted, got)


def _refuse_prefix_rows(batch: GroundedBatch, types: Tensor, mask: Tensor | None) -> None:
    if not checks.values_visible(types):
        return
    prefix = types == 0
    if mask is not None:
        prefix = prefix & mask.bool()
    sees_later = prefix & prefix.roll(-1, 1)
    sees_later[:, -1] = False
    for name in ("text_position", *_DESCRIBED):
        position = getattr(batch, name).flatten(1)
        if bool((sees_later.gather(1, position.clamp(min=0).long()) & (position >= 0)).any()):
            got = "a row inside the prefix, which sees later tokens (token_type_ids 0)"
            fail(f"gk_{name}", "rows of the answer, or the one before it", got)


def _refuse_image_rows(batch: GroundedBatch, of_image: Tensor) -> None:
    for name in _DESCRIBED:
        position = getattr(batch, name).flatten(1)
        if not checks.values_visible(position, of_image):
            continue
        if bool((of_image.gather(1, position.clamp(min=0).long()) & (position >= 0)).any()):
            got = "a row that is a token of an image, which sees its whole image"
            fail(f"gk_{name}", "rows of text tokens", got)
