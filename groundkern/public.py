"""The functions and classes of `groundkern`, which imports them when they are first used."""

# `as`: names that the module offers, not only uses. In a typed package checkers want to be told.

from groundkern.backends import available_backends as available_backends
from groundkern.divergence.api import AttentionReference as AttentionReference
from groundkern.divergence.api import attention_divergence as attention_divergence
from groundkern.ops.attention_map.api import attention_contribution as attention_contribution
from groundkern.ops.attention_map.api import attention_kl as attention_kl
from groundkern.ops.attention_map.api import attention_map as attention_map
from groundkern.ops.linear_cross_entropy.api import CrossEntropy as CrossEntropy
from groundkern.ops.linear_cross_entropy.api import LogProb as LogProb
from groundkern.ops.linear_cross_entropy.api import linear_cross_entropy as linear_cross_entropy
from groundkern.ops.linear_cross_entropy.api import linear_log_prob as linear_log_prob
from groundkern.ops.linear_kl.api import linear_kl as linear_kl
from groundkern.ops.side_attention.api import SideAttention as SideAttention
from groundkern.ops.side_attention.api import side_attention as side_attention
from groundkern.row_blocks import logit_budget as logit_budget
from groundkern.row_blocks import logit_dtype as logit_dtype
from groundkern.row_blocks import set_logit_budget as set_logit_budget
from groundkern.row_blocks import set_logit_dtype as set_logit_dtype
from groundkern.selection import KeySets as KeySets
from groundkern.selection import LabelBags as LabelBags
from groundkern.selection import QueryRows as QueryRows
from groundkern.selection import SoftTargets as SoftTargets
