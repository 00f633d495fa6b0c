"""What a grounded forward pass returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class GroundedOutput(ModelOutput):
    """Losses, and what was measured in each row; rows are those of `gk_*_position` tensors.

    Everything but `loss` is detached. Padding rows hold log probability 0 and prediction -1.
    In training mode only the attached objectives are computed, in evaluation mode also those of
    SMAM, DV-SFT and KLAL that are not attached, with their defaults.

    Args:
        loss: fp32 scalar, `text + sum of weight * part` over the attached objectives.
        parts: fp32 scalars by name ("text", "smam_grounding", "smam_cross_entropy", "word",
            "map_kl", "phrase", "subject", "composition", "margin_mean", "margin_max",
            "lens_raise", "lens_suppress", "policy", "distill_attention", "distill_tokens";
            "policy_divergence", (R2) without advantages, which is in no loss; "router_aux" of a
            mixture of experts with `output_router_logits` on), each already divided by its
            denominator: over an accumulated batch they add up to the mean. They are without their
            weights, except for "router_aux", which includes the model's own coefficient. GradCAM
            terms are left out when gradients are off.
        text_log_prob, text_predicted: fp32 and int64 [B, Rt], log pi of the trained tokens, and the
            most probable token.
        text_entropy: fp32 [B, Rt] with `gk_temperature`, of the distributions that predict the
            trained tokens. With it `text_log_prob` and this carry gradients, at that temperature,
            and `loss` and `parts` are without the text's.
        word_log_prob, word_predicted: the same of the labelled visual tokens, [B, Rw]; of several
            labels the first, `gk_word_label`.
        side_log_prob: fp32 [B, Rs], log pi+ of the aligned answer tokens.
        maps: fp32 [B, Rm, C] with `gk_record="maps"`: attention over the image, mean of heads and
            layers. With "visible" it is normalised over all that a row sees, and says how much of
            it is on the image.
        klal_map: fp32 [B, Rm, C] with `gk_record="klal"`: the map that KLAL with `average_layers`
            compares with its target, of its layers and head weights, before it is divided by its
            sum.
        head_maps: fp32 [B, Rm, L, H, C] with `gk_record="heads"`: attention of every head of every
            layer of softmax attention on the row's image, normalised over all visible keys, so that
            a sum over C is the head's visual mass.
        contributions: fp32 [B, Rs, C] with `gk_record="contributions"`: (C1), summed over layers.
        gradcam: fp32 [B, Rs, C] with `gk_record="gradcam"`: attention times the rectified gradient
            of the aligned token's logit, summed over heads and layers. If "layers" is recorded too,
            maps, contributions and gradcam are [B, R, L, C].
        policy_maps: fp32 [B, Ro, M, S] with `gk_record="policy"`: the head mean of attention of the
            rows of `gk_policy_position` over all positions but their own, in each layer of
            `AttentionPolicy.layers`, not renormalised: it sums to 1 less what is left out. As
            `gk_policy_reference` it is what later steps are compared with.
        main_logits, side_logits: fp32 [B, Rs, V] with `gk_record="logits"`.
    """

    loss: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    text_log_prob: Tensor | None = None
    text_predicted: Tensor | None = None
    text_entropy: Tensor | None = None
    word_log_prob: Tensor | None = None
    word_predicted: Tensor | None = None
    side_log_prob: Tensor | None = None
    maps: Tensor | None = None
    klal_map: Tensor | None = None
    head_maps: Tensor | None = None
    contributions: Tensor | None = None
    gradcam: Tensor | None = None
    policy_maps: Tensor | None = None
    main_logits: Tensor | None = None
    side_logits: Tensor | None = None
