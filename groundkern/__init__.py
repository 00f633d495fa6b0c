"""Grounding supervision of vision-language models at the price of plain fine-tuning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundkern import losses, lse, maps, metrics
    from groundkern.public import *

__version__ = "0.1.0"
SUBMODULES = ("losses", "lse", "maps", "metrics")
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
    "losses",
    "lse",
    "maps",
    "metrics",
    "set_logit_budget",
    "set_logit_dtype",
    "side_attention",
]


if not TYPE_CHECKING:  # to a checker every name would be one of the package's

    def __getattr__(name: str) -> Any:
        """Imports what is named, once: the package alone does not cost the seconds of torch."""
        if name in SUBMODULES:
            return import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from groundkern import public

        globals()[name] = getattr(public, name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
