"""Classes of transformers by name, at the time they are needed: older ones do not have them all."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import transformers
from transformers.processing_utils import ProcessorMixin

from benchmarks.families.zoo.making import Unavailable, imported
from groundkern.hf.data.processor import pil_image_processor, without_video


def processor_class(family: str, name: str) -> type[ProcessorMixin]:
    """A family's processor without its video part.

    Raises:
        Unavailable: this transformers does not know the family.
    """
    module = f"transformers.models.{family}.processing_{family}"
    why = f"transformers {transformers.__version__} has no processor of {family}"
    return without_video(getattr(imported(module, why), f"{name}Processor"))


def pil_images(family: str, name: str, **settings: Any) -> Any:
    """A family's image processor that works on PIL images.

    Raises:
        Unavailable: this transformers does not know the family.
    """
    try:
        return pil_image_processor(family, name)(**settings)
    except ImportError as error:
        why = f"transformers {transformers.__version__} has no image processor of {family}"
        raise Unavailable(why) from error


def torchvision_images(family: str, name: str, **settings: Any) -> Any:
    """A family's image processor, of those that exist on torchvision alone.

    Raises:
        Unavailable: no torchvision, or this transformers does not know the family.
    """
    imported("torchvision", f"transformers' image processor of {family} needs torchvision")
    module = f"transformers.models.{family}.image_processing_{family}"
    try:
        return getattr(import_module(module), f"{name}ImageProcessor")(**settings)
    except ImportError as error:
        why = f"transformers {transformers.__version__} has no image processor of {family}"
        raise Unavailable(why) from error
