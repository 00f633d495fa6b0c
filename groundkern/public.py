"""The functions and classes of `groundkern`, which imports them when they are first used."""

from groundkern.backends import available_backends
from groundkern.divergence.api import AttentionReference, attention_divergence
from groundkern.ops.attention_map.api import attention_contribution, attention_kl, attention_map
from groundkern.ops.linear_cross_entropy.api import (
    CrossEntropy,
    LogProb,
    linear_cross_entropy,
    linear_log_prob,
)
from groundkern.ops.linear_kl.api import linear_kl
from groundkern.ops.side_attention.api import SideAttention, side_attention
from groundkern.row_blocks import logit_budget, logit_dtype, set_logit_budget, set_logit_dtype
from groundkern.selection import KeySets, LabelBags, QueryRows, SoftTargets

# In a typed package a checker lets through what is named here.
__all__ = [
    "AttentionReference",
    "CrossEntropy",
    "KeySets",
    "LabelBags",
    "LogProb",
    "QueryRows",
    "SideAttention",
    "SoftTargets",
    "attention_contribution",
    "attention_divergence",
    "attention_kl",
    "attention_map",
    "available_backends",
    "linear_cross_entropy",
    "linear_kl",
    "linear_log_prob",
    "logit_budget",
    "logit_dtype",
    "set_logit_budget",
    "set_logit_dtype",
    "side_attention",
]
