"""The token ids that stand for visual tokens, for the collator and for the model alike."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

NAMES = ("image_token_id", "image_token_index", "image_patch_id")  # of configs
VIDEO_NAMES = ("video_token_id", "video_token_index")


def image_token_id(config: Any, processor: Any = None) -> int | None:
    """Find the id of visual tokens of images.

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


def video_token_id(config: Any, processor: Any = None) -> int | None:
    """Find the id of visual tokens of videos.

    Args:
        config: the model's config.
        processor: the model's processor, which is asked last.

    Returns:
        The id that the config names, else the processor's; None: none of them knows.
    """
    known = [getattr(config, name, None) for name in VIDEO_NAMES]
    known.append(getattr(processor, VIDEO_NAMES[0], None))
    return next((found for found in known if isinstance(found, int)), None)


def visual_token_ids(config: Any) -> frozenset[int]:
    """The ids of visual tokens, of images and of videos.

    Args:
        config: the model's config.

    Returns:
        Those that it names; none for a text model.
    """
    ids = image_token_id(config), video_token_id(config)
    return frozenset(token for token in ids if token is not None)


def one_of(ids: Tensor, visual: Collection[int]) -> Tensor:
    """Which token ids are of visual tokens.

    Args:
        ids: integers.
        visual: of `visual_token_ids`.

    Returns:
        bool, in the shape of `ids`; nothing waits for the device.
    """
    found = torch.zeros_like(ids, dtype=torch.bool)
    for index in visual:
        found |= ids == index
    return found
