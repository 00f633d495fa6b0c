"""Loading a processor with or without torchvision, which video processors need."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType

from transformers import AutoConfig, AutoProcessor, BaseImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin


def pil_image_processor(family: str, name: str) -> type[BaseImageProcessor]:
    """Find the image processor class that needs no torchvision, by its name in this transformers.

    Args:
        family: a folder of `transformers.models`, such as `qwen2_vl`.
        name: what the class's name begins with, such as `Qwen2VL`.

    Returns:
        `Qwen2VLImageProcessorPil`; in a transformers without it, `Qwen2VLImageProcessor`, which
        then is the one that needs no torchvision.
    """
    folder, suffix = f"transformers.models.{family}.", "Pil"
    module = f"image_processing_pil_{family}"
    if find_spec(folder + module) is None:
        module, suffix = f"image_processing_{family}", ""
    return getattr(import_module(folder + module), f"{name}ImageProcessor{suffix}")


@cache
def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same processor without its video part, under the same name, so that it saves alike.

    Args:
        processor_class: a processor whose last modality argument may be `video_processor`.

    Returns:
        A subclass made from an image processor and a tokenizer alone; one for each class.
    """
    attributes = [name for name in processor_class.get_attributes() if name != "video_processor"]
    members = {"get_attributes": classmethod(lambda cls: attributes), "__module__": __name__}
    init = _video_optional(processor_class.__init__)
    if init is not None:
        members |= {"__init__": init, "apply_chat_template": ProcessorMixin.apply_chat_template}
    return type(processor_class.__name__, (processor_class,), members)


def _video_optional(init: FunctionType) -> FunctionType | None:
    """A constructor that requires a video part, with None as its default; None if `init` does not
    require one.

    SmolVLM's does, and its chat template looks at the part too. It is a copy and not a wrapper,
    because transformers reads the names of the arguments from the code.
    """
    names, defaults = (
        init.__code__.co_varnames[: init.__code__.co_argcount],
        init.__defaults__ or (),
    )
    if "video_processor" not in names[: len(names) - len(defaults)]:
        return None
    required = names.index("video_processor")
    defaults = (None,) * (len(names) - required - len(defaults)) + defaults
    return FunctionType(init.__code__, init.__globals__, init.__name__, defaults, init.__closure__)


def text_options(processor: ProcessorMixin, text: str) -> dict[str, bool]:
    """How a rendered chat is given to a processor: without a second first token.

    Args:
        processor: of a model.
        text: a chat as the processor's template renders it.

    Returns:
        Keyword arguments of the processor.
    """
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def load_processor(path: str | os.PathLike, **kwargs) -> ProcessorMixin:
    """`AutoProcessor.from_pretrained`, except that a video part that cannot be loaded is left out.

    Video processors need torchvision; images and text do not, and groundkern supports no videos.

    Args:
        path: folder (or hub name) of a model with its processor, config.json included.
        **kwargs: options of `from_pretrained` (`revision`, `local_files_only`, ...).

    Returns:
        The processor of the model's family.

    Raises:
        ImportError, OSError, ValueError: as `from_pretrained`, when the image part, the tokenizer
            or the config cannot be loaded either.

    Source: transformers' `AutoProcessor`.
    """
    try:
        return AutoProcessor.from_pretrained(path, **kwargs)
    except (ImportError, OSError, ValueError):
        config = AutoConfig.from_pretrained(path, **kwargs)
        processor_class = PROCESSOR_MAPPING.get(type(config), None)
        if processor_class is None or "video_processor" not in processor_class.get_attributes():
            raise
        return without_video(processor_class).from_pretrained(path, **kwargs)
