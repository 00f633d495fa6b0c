"""One call of any family's processor for a batch of rendered chats, their images and videos.

Most processors take the same arguments; what some do of their own is here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs

from groundkern.checks import fail
from groundkern.hf.data.processor import text_options

if TYPE_CHECKING:
    from PIL import Image

    from groundkern.hf.data.video import Video


REPORTS = "return_text_replacement_offsets" in TextKwargs.__annotations__
"""Whether this transformers tells what an image's placeholder became; 5.1 does not."""


def placeholder(processor: Any) -> str:
    """The text that a chat template writes once for each image, and the processor replaces.

    Args:
        processor: of a model.

    Raises:
        ValueError: a processor that replaces none (PP-Chart2Table, whose template writes every
            visual token itself).
    """
    token = getattr(processor, "image_placeholder_token", None)  # Qianfan-OCR
    token = token or getattr(processor, "image_token", None)
    if not token:
        wanted = "an image token, which the processor replaces by visual tokens"
        fail("processor.image_token", wanted, token)
    return token


def video_placeholder(processor: Any) -> str:
    """The text that a chat template writes once for each video, and the processor replaces.

    Args:
        processor: of a model.

    Raises:
        ValueError: a processor without a video part, or that replaces none.
    """
    if getattr(processor, "video_processor", None) is None:
        wanted = "a part for videos (transformers loads it where torchvision is installed)"
        fail("processor.video_processor", wanted, "none")
    token = getattr(processor, "video_token", None)
    if not token:
        wanted = "a video token, which the processor replaces by visual tokens"
        fail("processor.video_token", wanted, token)
    return token


def rendered(
    processor: Any,
    messages: list[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    *,
    asks: bool = False,
) -> str:
    """A chat as its template renders it, with what the processor itself would put in front.

    Args:
        processor: has the chat template.
        messages: the conversation.
        tools: JSON schemas of functions that the template is to name.
        asks: an answer is to follow, so that the template begins its turn.

    Raises:
        ValueError: a processor without a chat template.
    """
    templated = getattr(processor, "chat_template", "") is not None
    if not templated and not _own(processor, "apply_chat_template"):
        fail("processor.chat_template", "a chat template, which renders the messages", None)
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if asks:
        options["add_generation_prompt"] = True
    text = processor.apply_chat_template(messages, tokenize=False, **options)
    if _is(processor, "Molmo2Processor"):
        tokenizer = processor.tokenizer
        first = tokenizer.bos_token or tokenizer.eos_token
        return text if text.startswith(first) else first + text
    return text


def call(
    processor: Any,
    images: Sequence[Sequence[Image.Image]],
    texts: Sequence[str],
    videos: Sequence[Sequence[Video]] = (),
    *,
    padding: bool = False,
) -> dict[str, Any]:
    """Process a batch.

    Args:
        processor: of a model.
        images: the images of each chat.
        texts: the chats, as `rendered` makes them.
        videos: the videos of each chat; none: no chat has any.
        padding: make sequences of one length.

    Returns:
        What the processor returned: a list for each text of `input_ids`, of `offset_mapping` and of
        what else runs along with them; tensors of images and videos; `text_replacement_offsets`,
        unless this transformers has none.

    Raises:
        ValueError: the processor's own.
    """
    flat = [image for sample in images for image in sample]
    lists: Any = [list(sample) for sample in images]
    if _is(processor, "GotOcr2Processor"):  # a list in a list would be the pages of one image
        lists = flat
    ragged = _is(processor, "PerceptionLMProcessor")
    found = processor(
        images=lists if flat else None,
        text=list(texts),
        images_kwargs={"return_tensors": None if ragged else "pt"},
        **_video_options([video for sample in videos for video in sample]),
        **_text_options(processor, texts[0], padding=padding),
    )
    features = dict(found)
    if ragged and flat:  # the model takes any number of tiles, its processor one for all images
        features["pixel_values"] = torch.cat(list(features["pixel_values"]))[None]
    if "text_replacement_offsets" not in features and _own(processor, "replace_image_token"):
        features["text_replacement_offsets"] = _replaced(processor, features, texts, len(flat))
    return features


def tensors(
    processor: Any,
    images: Sequence[Sequence[Image.Image]],
    texts: Sequence[str],
    videos: Sequence[Sequence[Video]] = (),
    *,
    padding: bool = False,
) -> dict[str, torch.Tensor]:
    """Process a batch for a model that is to see it without supervision.

    Args, Raises: as `call`.

    Returns:
        Its keyword inputs, on the CPU.
    """
    features = call(processor, images, texts, videos, padding=padding)
    for name in ("offset_mapping", "text_replacement_offsets"):
        features.pop(name, None)
    lists = getattr(processor, "skip_tensor_conversion", None)
    made = BatchFeature(features).convert_to_tensors("pt", lists)
    return {name: x for name, x in made.items() if isinstance(x, torch.Tensor)}


def sample(processor: Any, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Process one sample of some images, each with text behind it, which asks nothing.

    Args, Returns, Raises: as `tensors`.
    """
    if getattr(processor, "chat_template", None):
        content = len(images) * [{"type": "image"}, {"type": "text", "text": "?"}]
        text = rendered(processor, [{"role": "user", "content": content}])
    else:
        text = f"{placeholder(processor)}?" * len(images)
    return tensors(processor, [images], [text])


def in_dtype_of(config: Any, features: dict[str, Any]) -> dict[str, Any]:
    """Features of images in the dtype that a model takes: Llama 4's processor makes bfloat16
    whatever its model is.

    Args:
        config: the model's.
        features: what its processor returned.
    """
    dtype = getattr(config, "dtype", None) or torch.float32
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
        for name, x in features.items()
    }


def laid_out(processor: Any, images: list[list[Any]], texts: list[str]) -> list[str]:
    """The texts as a processor changes them before it replaces the images' placeholders.

    PaliGemma's puts its first token behind the images and a line break at the end.

    Args:
        processor: of a model.
        images: of each text.
        texts: rendered chats.
    """
    if not _own(processor, "prepare_inputs_layout"):
        return texts
    if _is(processor, "GotOcr2Processor"):  # writes a text only where there is none
        return texts
    return processor.prepare_inputs_layout(images=images if any(images) else None, text=texts)[1]


def _video_options(videos: Sequence[Video]) -> dict[str, Any]:
    """Videos as frames that were sampled already, and when."""
    if not videos:
        return {}
    options = {
        "return_tensors": "pt",
        "do_sample_frames": False,
        "video_metadata": [_metadata(video) for video in videos],
    }
    return {"videos": [list(video.frames) for video in videos], "videos_kwargs": options}


def _metadata(video: Video) -> dict[str, Any]:
    """As transformers wants it of sampled frames, whose indices count seconds here.

    What processors make of it then is exact for frames at any times: Qwen3-VL's timestamps are
    index / fps, and Qwen2.5-VL's frames per second are frames / total_num_frames x fps.
    """
    width, height = video.frames[0].size
    duration = video.spacing * len(video.frames)
    return {
        "total_num_frames": duration,
        "fps": 1.0,
        "frames_indices": list(video.times),
        "duration": duration,
        "width": width,
        "height": height,
    }


def _text_options(processor: Any, text: str, *, padding: bool) -> dict[str, Any]:
    """All options of texts, each where this transformers looks for it.

    Old ones drop flat options beside `text_kwargs`; newer ones want some of them flat.
    """
    options = {
        "return_tensors": None,  # LLaVA-NeXT-Video's default are tensors
        "padding": padding,
        "return_offsets_mapping": True,
        **text_options(processor, text),
    }
    if REPORTS:
        options["return_text_replacement_offsets"] = True
    flat = {name: options.pop(name) for name in ProcessingKwargs.__annotations__ if name in options}
    return {"text_kwargs": options, **flat}


def _replaced(
    processor: Any, features: Mapping[str, Any], texts: Sequence[str], images: int
) -> list[list[dict[str, Any]]]:
    """The same from a processor whose call does not report it, such as Nemotron-H-Omni's."""
    replacements = [processor.replace_image_token(features, image) for image in range(images)]
    return processor.get_text_with_replacements(list(texts), replacements)[1]


def _is(processor: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(processor).__mro__)


def _own(processor: Any, name: str) -> bool:
    """Whether a processor's class has a method of its own, not what all processors inherit."""
    method = getattr(type(processor), name, None)
    return method is not None and method is not getattr(ProcessorMixin, name, None)
