"""groundkern for transformers models: attach, collate, train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundkern.hf.public import *

__all__ = [
    "AttentionPolicy",
    "AttentionReward",
    "Basic",
    "Distillation",
    "DivergedError",
    "DoctorReport",
    "DvSft",
    "Evidence",
    "Examination",
    "GroundedExample",
    "GroundedOutput",
    "GroundingCollator",
    "GroundingMixin",
    "GroundingTrainer",
    "Hist",
    "IdleImage",
    "Klal",
    "LogitLens",
    "Margins",
    "MeasuredGeometry",
    "Objectives",
    "PatchText",
    "Phrase",
    "Raster",
    "Region",
    "RolloutMixin",
    "SampleRegions",
    "Smam",
    "Video",
    "Word",
    "add_tokens",
    "attach",
    "compile_layers",
    "context_parallel",
    "detach",
    "doctor",
    "examine",
    "gate",
    "has_images",
    "image_geometry",
    "load_beside_adapter",
    "load_processor",
    "objectives_of",
    "packing_refusal",
    "policy_rows",
    "row_counts",
    "save_beside_adapter",
    "supported_objectives",
    "video_geometry",
]


if not TYPE_CHECKING:  # to a checker every name would be one of the package's

    def __getattr__(name: str) -> Any:
        """Imports what is named, once: the package alone costs none of transformers' seconds."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from groundkern.hf import public

        globals()[name] = getattr(public, name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
