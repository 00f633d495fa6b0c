"""Loading a processor with or without torchvision, which video processors need."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType
from typing import Any, cast

from transformers import AutoConfig, AutoProcessor, BaseImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin

from groundkern.checks import require


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
        processor_class: a processor of images, text and maybe videos or sound.

    Returns:
        A subclass made from the other parts alone, one for each class; the class itself if it has
        no video part.
    """
    if "video_processor" not in processor_class.get_attributes():
        return processor_class
    members: dict[str, Any] = {"__module__": __name__}
    init = _video_optional(cast(FunctionType, processor_class.__init__))
    if init is not None:
        members |= {"__init__": init, "apply_chat_template": ProcessorMixin.apply_chat_template}
    return type(processor_class.__name__, (processor_class, _WithoutVideo), members)


class _WithoutVideo(ProcessorMixin):
    """Stands between a processor class and `ProcessorMixin`, and leaves the video part out.

    The part may be anywhere among the arguments: omni processors have it before the tokenizer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parts = dict(zip(super().get_attributes(), args)) | kwargs
        parts.pop("video_processor", None)
        super().__init__(**parts)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]

    @classmethod
    def from_args_and_dict(
        cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any
    ) -> ProcessorMixin:
        args = list(args)
        args.insert(super().get_attributes().index("video_processor"), None)
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """For workers that are spawned: the class is made, so that no module has it by name."""
        return _unpickled, (type(self).__mro__[1],), self.__dict__


def _unpickled(processor_class: Any) -> ProcessorMixin:
    made = without_video(processor_class)
    return made.__new__(made)


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
    """How a rendered chat is given to a processor: without a second first token, and so that it
    returns the kind of each token if its model wants that.

    Args:
        processor: of a model.
        text: a chat as the processor's template renders it.

    Returns:
        Keyword arguments of the processor.
    """
    options = {}
    bos = processor.tokenizer.bos_token
    if bos and text.startswith(bos):
        options["add_special_tokens"] = False
    # Cosmos3 Edge's processor names them and leaves them out
    if "mm_token_type_ids" in getattr(processor, "model_input_names", ()):
        options["return_mm_token_type_ids"] = True
    return options


def marks_prefix(processor: ProcessorMixin) -> bool:
    """Whether a processor tells a prefix, which sees itself whole, from a suffix to be learned.

    PaliGemma's does, by `token_type_ids` and labels that it makes of a batch of one length.

    Args:
        processor: of a model.
    """
    return "labels" in getattr(processor, "model_input_names", ())


def fixed_image_options(processor: ProcessorMixin) -> Mapping[str, Any]:
    """The settings of images that a processor's class fixes, whatever its image processor says.

    Args:
        processor: of a model.
    """
    fixed = getattr(processor, "images_kwargs", None)
    if fixed is None:  # before transformers 5.21 they are beside the class
        defaults = getattr(processor.valid_processor_kwargs, "_defaults", {})
        fixed = defaults.get("images_kwargs", {})
    return fixed


def with_image_options(processor: ProcessorMixin, options: Mapping[str, Any]) -> ProcessorMixin:
    """The same processor with other settings of images, such as `max_pixels`.

    They become settings of its image processor, so that calls, the geometry of visual tokens and
    what is saved agree; an option that is given to one call is seen by that call alone.

    Args:
        processor: of a model.
        options: keyword arguments of its image processor.

    Returns:
        A shallow copy with an image processor of its own.

    Raises:
        ValueError: a setting that the image processor does not have, or that the processor's class
            fixes.
    """
    images = processor.image_processor
    known = {*images.valid_kwargs.__annotations__, *images.to_dict()}
    for name in options:
        require(
            name in known, f"image_options.{name}", f"a setting of {type(images).__name__}", "none"
        )
    fixed = fixed_image_options(processor)
    for name in options:
        wanted = f"a setting that {type(processor).__name__} does not fix at {fixed.get(name)!r}"
        require(name not in fixed, f"image_options.{name}", wanted, options[name])
    replaced = copy(processor)
    replaced.image_processor = type(images)(**{**_own_settings(images, options), **options})
    return replaced


def _own_settings(images: BaseImageProcessor, options: Mapping[str, Any]) -> dict[str, Any]:
    """What an image processor is made of, without the size if the options bound it in pixels.

    `min_pixels` and `max_pixels` become parts of `size`, whose other part stays.
    """
    settings = {k: v for k, v in images.to_dict().items() if k != "image_processor_type"}
    size = settings.get("size") or {}
    if {"min_pixels", "max_pixels"} & set(options) and "longest_edge" in size:
        del settings["size"]
        settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return settings


def load_processor(
    path: str | os.PathLike[str],
    *,
    image_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> ProcessorMixin:
    """`AutoProcessor.from_pretrained`, except that a video part that cannot be loaded is left out.

    Video processors need torchvision; images and text do not. A sample with videos is refused then.

    Args:
        path: folder (or hub name) of a model with its processor, config.json included.
        image_options: other settings of its images (`with_image_options`).
        **kwargs: options of `from_pretrained` (`revision`, `local_files_only`, ...).

    Returns:
        The processor of the model's family.

    Raises:
        ImportError, OSError, ValueError: as `from_pretrained`, when the image part, the tokenizer
            or the config cannot be loaded either.

    Source: transformers' `AutoProcessor`.
    """
    processor = _loaded(path, kwargs)
    return with_image_options(processor, image_options) if image_options else processor


def _loaded(path: str | os.PathLike[str], options: dict[str, Any]) -> ProcessorMixin:
    try:
        return AutoProcessor.from_pretrained(path, **options)
    except (ImportError, OSError, ValueError) as error:
        config = AutoConfig.from_pretrained(path, **options)
        processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
        if processor_class is None or "video_processor" not in processor_class.get_attributes():
            raise
        try:
            return without_video(processor_class).from_pretrained(path, **options)
        except AttributeError:  # MiniCPM-V's reads settings of its video part
            raise error from None
