"""Rows of a batch whose attention is compared with what it was: those of the trained tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def policy_rows(
    batch: Mapping[str, Tensor], advantage: Tensor, *, rows: str = "own"
) -> dict[str, Tensor]:
    """The tensors of `AttentionPolicy` for a batch of sampled answers, without references.

        batch |= policy_rows(batch, advantage)
        with torch.no_grad():
            maps = model(**batch, gk_record="policy").policy_maps
        batch["gk_policy_reference"] = maps  # for the updates that follow

    Args:
        batch: with `gk_text_position`, the rows that predict the tokens of the answers.
        advantage: [B] or [B, Rt] float, of any sign.
        rows: "own", the tokens' own rows, or "predictor", the rows before them, as
            `AttentionPolicy.rows` says.

    Returns:
        `gk_policy_position` int32 and `gk_policy_weight` fp32 [B, Rt], and `gk_policy_reference`
        [B, Rt, 0, S] of no layer, for the recorded maps to replace.

    Source: (R1), (R2) of docs/methods/policy-and-teacher.md.
    """
    before = batch["gk_text_position"].int()
    position = before if rows == "predictor" else torch.where(before >= 0, before + 1, -1)
    weight = advantage.float() if advantage.dim() == 2 else advantage.float()[:, None]
    weight = torch.where(before >= 0, weight.expand(before.shape), 0.0)
    reference = weight.new_empty((*before.shape, 0, batch["input_ids"].shape[1]))
    return {
        "gk_policy_position": position,
        "gk_policy_weight": weight,
        "gk_policy_reference": reference,
    }
