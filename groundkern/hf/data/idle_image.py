"""One more image for a batch that has none, so that its rank runs the vision tower as others do.

Ranks that share out weights or gradients must call the same modules. `IdleImage` puts a small image
behind the tokens of a batch, as padding that supervises nothing: the model's own forward then runs
the tower where it always does, and no other token attends to what comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from groundkern.checks import fail, require
from groundkern.hf.data.batch import FIELDS
from groundkern.hf.data.calling import in_dtype_of, sample
from groundkern.hf.data.processor import marks_prefix
from groundkern.hf.data.tokens import PER_TOKEN

SIDE = 32  # pixels
IMAGES = ("pixel_values", "image_patches")  # how names of pixels begin
VIDEOS = "pixel_values_videos"
LABELS = {"labels": -100, "shift_labels": -100}  # per token too, and what pads them
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")  # of documents, beside positions
UNFIT = {"hunyuan_vl": "looks for images among attended tokens alone"}
# These call modules once for each image, or others for an image in tiles.
BY_IMAGE = (
    "deepseek_ocr2",
    "lfm2_vl",
    "lfm3_vl",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "paddleocr_vl",
    "step3p7",
    "unlimited_ocr",
)


def has_images(batch: Mapping[str, Any]) -> bool:
    """Whether a batch makes a model run its vision tower on images.

    Args:
        batch: keyword inputs of a model.

    Returns:
        True if it has pixels of images.
    """
    given = (name for name, x in batch.items() if x is not None)
    return any(name.startswith(IMAGES) and name != VIDEOS for name in given)


class IdleImage:
    """Gives a batch without images one that changes no number.

        batch = IdleImage(processor, model.config)(batch)

    The tokens of a small image stand behind those of one sample: in its padding if there is room,
    otherwise every sequence gets longer. They have no labels and no supervision, and an attention
    mask of 0; in a packed batch, which has no mask, they are a document of their own. Losses stay
    what they were, and parameters that only images reach get gradients of exactly 0.

    Args:
        processor: the model's.
        config: the model's.
        sharded: ranks gather weights together, so that the order of calls must be that of others.

    Raises:
        ValueError: a family whose forward does not run its tower so, or not in that order; the
            processor's own.
    """

    def __init__(self, processor: Any, config: Any, *, sharded: bool = True) -> None:
        kind = config.model_type
        reason = UNFIT.get(kind)
        if sharded and kind in BY_IMAGE:
            reason = "calls other modules for other images"
        wanted = "a model that runs its vision tower alike for any images"
        require(reason is None, "model", wanted, f"{kind}, which {reason}")
        # Something else in every place: some models take an image of one colour for none.
        image = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
        self._image = in_dtype_of(config, sample(processor, [image]))
        self._image.pop("labels", None)  # of PaliGemma's
        found = {name: self._image.pop(name)[0] for name in PER_TOKEN if name in self._image}
        found.pop("attention_mask", None)
        self._tokens = found.pop("input_ids")
        self._types = found
        filler = processor.tokenizer.pad_token_id
        self._filler = int(self._tokens[-1]) if filler is None else filler
        self._marks_prefix = marks_prefix(processor)
        configs = config, config.get_text_config()
        self._routes = any(getattr(each, "output_router_logits", False) for each in configs)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add the image.

        Args:
            batch: keyword inputs of a model, without images.

        Returns:
            A batch with one image.

        Raises:
            ValueError: a batch with images; an input with one entry per token that is not known.
        """
        require(not has_images(batch), "batch", "one without images", "pixels")
        ids = batch["input_ids"]
        made = self._typed(batch)
        row, start = _room(made.get("attention_mask"), ids)
        stop = start + len(self._tokens)
        more = max(0, stop - ids.shape[1])
        made = {name: _longer(name, x, ids, more, self._filler) for name, x in made.items()}
        for name, values in {"input_ids": self._tokens, **self._types}.items():
            made[name][row, start:stop] = values.to(made[name])
        return made | {name: x.to(ids.device) for name, x in self._image.items()}

    def _typed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the inputs per token that an image needs, where it has none."""
        made = {name: x for name, x in batch.items() if x is not None}
        for name in LENGTHS:
            wanted = "no lengths: documents that position_ids alone tell"
            require(name not in made, name, wanted, "lengths of documents")
        if self._marks_prefix and "token_type_ids" not in made:
            fail("token_type_ids", "0 for image and prompt, 1 for the answer", "nothing")
        if "attention_mask" not in made and "position_ids" not in made:
            made["attention_mask"] = torch.ones_like(batch["input_ids"])
        if self._routes and "attention_mask" not in made:
            wanted = "False for packed rows without images: its loss would count the image"
            fail("output_router_logits", wanted, True)
        for name in self._types:
            made.setdefault(name, torch.full_like(batch["input_ids"], PER_TOKEN[name] or 0))
        return made


def _room(mask: Tensor | None, ids: Tensor) -> tuple[int, int]:
    """The sample with the most padding at its end, and where that begins."""
    if mask is None:
        return 0, ids.shape[1]
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    ends = (mask.bool() * place).amax(1)
    row = int(ends.argmin())
    return row, int(ends[row])


def _longer(name: str, x: Any, ids: Tensor, more: int, filler: int) -> Any:
    """An input for sequences that are longer by `more` tokens; a copy, if it has them."""
    if name == "position_ids":  # the new tokens are a document
        new = torch.arange(more, device=x.device, dtype=x.dtype)
        return torch.cat((x, new.expand(*x.shape[:-1], -1)), -1)
    fills = {**PER_TOKEN, "input_ids": filler, **LABELS}
    if name in fills:
        return pad(x, (0, more), value=fills[name]).clone()
    if name.startswith("gk_") and (spec := FIELDS.get(name[3:])):
        return pad(x, (0, more), value=spec.padding) if spec.dims.endswith("S") else x
    if isinstance(x, Tensor) and x.shape[:2] == ids.shape:
        fail(name, f"only {', '.join(fills)} to have one entry per token", list(x.shape))
    return x
