"""The functions and classes of `groundkern.hf`, which imports them when they are first used."""

from groundkern.hf.data.anchors import add_tokens
from groundkern.hf.data.batch import row_counts
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.data.controls import SampleRegions
from groundkern.hf.data.example import GroundedExample, Phrase, Region, Word
from groundkern.hf.data.geometry import image_geometry
from groundkern.hf.data.geometry.videos import video_geometry
from groundkern.hf.data.idle_image import IdleImage, has_images
from groundkern.hf.data.policy_rows import policy_rows
from groundkern.hf.data.processor import load_processor
from groundkern.hf.data.video import Video
from groundkern.hf.data.weights import gate
from groundkern.hf.examination import Examination, examine
from groundkern.hf.measuring.measured import MeasuredGeometry
from groundkern.hf.model.attach import attach, detach, objectives_of
from groundkern.hf.model.compiled import compile_layers
from groundkern.hf.model.context import context_parallel
from groundkern.hf.model.doctor import DoctorReport, doctor
from groundkern.hf.model.support import packing_refusal, supported_objectives
from groundkern.hf.objectives import (
    AttentionPolicy,
    Basic,
    Distillation,
    DvSft,
    Hist,
    Klal,
    LogitLens,
    Margins,
    Objectives,
    PatchText,
    Smam,
)
from groundkern.hf.output import GroundedOutput
from groundkern.hf.rewards import AttentionReward
from groundkern.hf.rollouts import Evidence, RolloutMixin
from groundkern.hf.trainer import GroundingMixin, GroundingTrainer
from groundkern.hf.watching.plain import DivergedError
from groundkern.hf.watching.saved import load_beside_adapter, save_beside_adapter
from groundkern.rasters import Raster

# In a typed package a checker lets through what is named here.
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
