"""The token id that stands for a visual token, for the collator and for the model alike."""

from __future__ import annotations

from typing import Any

NAMES = ("image_token_id", "image_token_index", "image_patch_id")  # of configs


def image_token_id(config: Any, processor: Any = None) -> int | None:
    """Find the id of visual tokens.

    Args:
        config: the model's config.
        processor: the model's processor, which is asked last.

    Returns:
        The id that the config names, else that of "<image>" in its vocabulary map (Chameleon,
        Emu3), else the processor's; None: none of them knows.
    """
    vocabulary = getattr(config, "vocabulary_map", None) or {}
    known = [getattr(config, name, None) for name in NAMES]
    known += [vocabulary.get("<image>"), getattr(processor, "image_token_id", None)]
    return next((found for found in known if isinstance(found, int)), None)
