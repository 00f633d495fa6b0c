"""The `gk_` tensors of a batch, each declared once: what the collator makes and a model is given.

Shapes, dtypes, padding, checks, what losses divide by and the table in docs/data/data-format.md all
follow from FIELDS and COUNT_RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from groundkern import checks
from groundkern.hf.data.image_token import one_of
from groundkern.hf.data.weights import weightless_rows_as_padding

_BITS = "_bits"  # behind the name of a weight whose bits are handed on as integers
INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Field(NamedTuple):
    """What one tensor of a batch is.

    Args:
        dims: its dimensions by name; a digit is a fixed size. S runs over tokens and is padded on
            the side that the tokenizer pads; every other dimension is padded at its end.
        values: what it holds, one of VALUES.
        meaning: one line, for people.
    """

    dims: str
    values: str
    meaning: str

    @property
    def dtype(self) -> torch.dtype:
        """What the collator makes; a model accepts any of INTEGERS or FLOATS for one of them."""
        return VALUES[self.values].dtype

    @property
    def padding(self) -> int:
        """The value of padding: -1, False or 0.0."""
        return -1 if self.dtype in INTEGERS else 0

    @property
    def absent(self) -> float | None:
        """What all values are if a batch leaves the field out; None: its group comes whole."""
        return VALUES[self.values].absent

    @property
    def is_position(self) -> bool:
        """Whether the values are positions of tokens, which padding on the left moves."""
        return VALUES[self.values].counts == "S"

    @property
    def supervises(self) -> bool:
        """False for a field that says what the tokens are and not what they should learn."""
        return self.dims != "B S"  # BASIC learns at every visual token


class Values(NamedTuple):
    """What the values of a field may be.

    Args:
        dtype: what the collator makes.
        below: -1 or in [0, below); None: not looked at.
        counts: what they count from the start of their sample, which moves when samples are packed
            into one row: its tokens S, images I, sets G or phrases P; None: nothing.
        absent: see `Field.absent`.
        least: finite values from here on; None: not looked at.
    """

    dtype: torch.dtype
    below: str | None = None
    counts: str | None = None
    absent: float | None = None
    least: float | None = None


VALUES = {
    "predictor": Values(torch.int32, "S-1", "S"),  # the position of a token that predicts the next
    "position": Values(torch.int32, "S", "S"),  # of a token
    "column": Values(torch.int32, None, "S"),  # a position, which the ops check
    "set": Values(torch.int32, "G", "G"),
    "phrase": Values(torch.int32, "P", "P"),
    "image": Values(torch.int32, None, "I"),
    "token id": Values(torch.int64, "V"),
    "number": Values(torch.int32),
    "bool": Values(torch.bool),
    "weight": Values(torch.float32, absent=1.0, least=0.0),  # of a row; 0: it is not there
    "signed weight": Values(torch.float32, absent=1.0, least=-float("inf")),  # of an advantage
    "attention": Values(torch.float32, absent=0.0, least=0.0),  # of any scale; kept as it is given
}

FIELDS = {
    "image": Field("B S", "image", "which image of its sample a visual token belongs to"),
    "text_position": Field("B Rt", "predictor", "rows that predict a trained token"),
    "side_position": Field("B Rs", "predictor", "SMAM: rows that predict an aligned token"),
    "side_set": Field("B Rs", "set", "the row's set in `gk_side_inside`; -1: not restricted"),
    "side_inside": Field("B G S", "bool", "the visual tokens inside a set of regions"),
    "side_weight": Field("B Rs", "weight", "what an aligned row counts for"),
    "word_position": Field("B Rw", "position", "DV-SFT: the labelled visual tokens themselves"),
    "word_label": Field("B Rw", "token id", "the label of a visual token"),
    "word_bag": Field("B I Y", "token id", "the labels of each image"),
    "word_weight": Field("B Rw", "weight", "what a labelled visual token counts for"),
    "several_label": Field(
        "B Rw L", "token id", "all labels of a visual token that has several; -1: one only"
    ),
    "several_weight": Field("B Rw L", "number", "what each of these counts for, above 0"),
    "map_position": Field("B Rm", "position", "KLAL: rows with a target map"),
    "map_token_position": Field(
        "B Rm", "position", "the token that the target belongs to: the row's own or the next"
    ),
    "map_image": Field("B Rm", "image", "the image of the sample that the target is on"),
    "map_target": Field("B Rm C", "number", "the target over `gk_map_columns`, at any scale"),
    "map_columns": Field("B C", "column", "every visual token, ascending"),
    "map_weight": Field("B Rm", "weight", "what a map row counts for"),
    "query_position": Field(
        "B Rm Q", "position", "GUI-AIMA: the tokens between a map row's last image and the row"
    ),
    "phrase_position": Field("B Rp", "predictor", "HIST: rows that predict a token of a phrase"),
    "phrase_number": Field("B Rp", "phrase", "which phrase of the sample, from 0"),
    "phrase_subject": Field("B Rp", "number", "1 if the token belongs to the subject, else 0"),
    "phrase_composite": Field("B K 3", "phrase", "a composite phrase and its two parts"),
    "phrase_weight": Field("B Rp", "weight", "what a token of a phrase counts for"),
    "lens_position": Field("B Rl", "position", "logit lens: the visual tokens themselves"),
    "lens_label": Field("B Rl", "token id", "the label of a concept"),
    "lens_inside": Field(
        "B Rl", "number", "1 if the visual token is on the concept's object, else 0"
    ),
    "lens_weight": Field("B Rl", "weight", "what a row of the logit lens counts for"),
    "policy_position": Field("B Ro", "position", "policy: rows whose attention is compared"),
    "policy_weight": Field("B Ro", "signed weight", "the row's advantage; rows of 0 count too"),
    "policy_reference": Field(
        "B Ro M S",
        "attention",
        "attention of each row in each of M layers, ascending, at any scale",
    ),
    "contrast_position": Field("B Rc", "position", "patch-text: visual tokens on words' regions"),
    "contrast_label": Field("B Rc X", "token id", "the words whose regions a visual token is on"),
    "contrast_weight": Field("B Rc", "weight", "what a row of patch-text contrast counts for"),
    "contrast_bag": Field("B I Z", "token id", "the words of each image that have a region"),
}
"""Every tensor of a batch by its name without `gk_`.

The word before `_` is a group, which comes whole or not at all. B is samples, S tokens, I images of
a sample (its videos count behind them), C visual tokens of a sample; Rt, Rs, Rw, Rm, Rp, Rl, Ro
and Rc are rows, M layers, G sets of regions, Y labels and Z words of an image, L labels and X words
of a visual token, Q query tokens of a map row, K composites. A token of several phrases has a row
for each. A weight that a batch leaves out is 1 in every row; a row of weight 0 is as if it were not
there (W1).
"""


class GroundedBatch:
    """The `gk_` tensors of a batch as a model sees them: an attribute for each of FIELDS.

    Rows keep the batch dimension, so that samplers, accelerate and FSDP slice them like any other
    input. A width may be 0.

    Args:
        tensors: every field, by its name without `gk_`.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        assert tensors.keys() == FIELDS.keys()
        vars(self).update(tensors)

    @classmethod
    def pop(cls, inputs: dict[str, Any], input_ids: Tensor) -> GroundedBatch:
        """Take the `gk_` tensors out of a model's keyword inputs; one that is missing has no rows.

        Args:
            inputs: the keyword inputs; loses its `gk_` tensors.
            input_ids: [B, S].

        Raises:
            TypeError, ValueError: a wrong dtype or shape, an unknown name, or a group of which only
                a part is there.
        """
        for name in [name for name in inputs if name.endswith(_BITS)]:
            inputs[name.removesuffix(_BITS)] = inputs.pop(name).view(torch.float32)
        given = {name: inputs.pop(f"gk_{name}") for name in FIELDS if f"gk_{name}" in inputs}
        unknown = sorted(name for name in inputs if name.startswith("gk_"))
        if unknown:
            checks.fail(unknown[0], f"one of {', '.join('gk_' + n for n in FIELDS)}", unknown[0])
        _check_groups(given)
        sizes = {"B": input_ids.shape[0], "S": input_ids.shape[1], "3": 3}
        for name, x in given.items():
            dims, dtype = FIELDS[name].dims, FIELDS[name].dtype
            wanted = next((kind for kind in (INTEGERS, FLOATS) if dtype in kind), dtype)
            checks.tensor(f"gk_{name}", x, dims, sizes, dtype=wanted, device=input_ids.device)
            if dtype in FLOATS and FIELDS[name].values != "attention":
                given[name] = x.to(dtype)
        given |= weightless_rows_as_padding(given)
        for name in FIELDS.keys() - given.keys():
            spec = FIELDS[name]
            shape = [sizes.get(dim, 0) for dim in spec.dims.split()]
            fill = spec.padding if spec.absent is None else spec.absent
            given[name] = input_ids.new_full(shape, fill, dtype=spec.dtype)
        return cls(given)

    def check_values(self, input_ids: Tensor, *, visual: Collection[int], vocabulary: int) -> None:
        """Look at the values if that needs no sync (`checks.values_visible`).

        Args:
            input_ids: [B, S].
            visual: the token ids of visual tokens; none: a text model.
            vocabulary: the number of token ids.

        Raises:
            ValueError: a row outside its sequence, an aligned row that is an image token, a map row
                whose token is neither its own nor the next, a set or label that does not exist, a
                label without a weight, a weight that is negative or not finite.
        """
        if not checks.values_visible(*(getattr(self, name) for name in FIELDS)):
            return
        length = input_ids.shape[1]
        phrases = int(self.phrase_number.max()) + 1 if self.phrase_number.numel() else 0
        sets = self.side_inside.shape[1]
        stops = {"S": length, "S-1": length - 1, "G": sets, "P": phrases, "V": vocabulary}
        for name, spec in FIELDS.items():
            if (below := VALUES[spec.values].below) is not None:
                _check_range(f"gk_{name}", getattr(self, name), stops[below])
            if (least := VALUES[spec.values].least) is not None:
                _check_finite(f"gk_{name}", getattr(self, name), least)
        token = input_ids.gather(1, self.side_position.clamp(min=0).long())
        on_image = one_of(token, visual) & (self.side_position >= 0)
        if bool(on_image.any()):
            checks.fail(
                "gk_side_position", "rows of text tokens", "a row that is an image token itself"
            )
        without = (self.several_label >= 0) & (self.several_weight <= 0)
        if bool(without.any()):
            got = int(self.several_weight[without].min())
            checks.fail("gk_several_weight", "a number above 0 for each label", got)
        self._check_words()
        row, own = self.map_position, self.map_token_position
        apart = (own - row)[(row >= 0) | (own >= 0)]
        if bool(((apart < 0) | (apart > 1)).any()):
            wanted = "the token of each row of gk_map_position or the next"
            checks.fail("gk_map_token_position", wanted, f"one {int(apart.abs().max())} away")

    def _check_words(self) -> None:
        """Every word of a row of patch-text contrast is one of its image's."""
        position, label = self.contrast_position, self.contrast_label  # [B, Rc], [B, Rc, M]
        image = self.image.gather(1, position.clamp(min=0).long())
        there = (image >= 0) & (image < self.contrast_bag.shape[1])
        wanted = "visual tokens of images with words in gk_contrast_bag"
        got = "one without"
        checks.require(bool((there | (position < 0)).all()), "gk_contrast_position", wanted, got)
        if not position.numel():
            return
        row = torch.arange(len(image), device=image.device)[:, None]
        bag = self.contrast_bag[row, image.clamp(min=0).long()]  # [B, Rc, Z]
        known = (label[..., None] == bag[..., None, :]).any(-1) | (label < 0)
        known = (known & (label >= 0).any(-1, keepdim=True)).all(-1) | (position < 0)
        wanted = "words of gk_contrast_bag of the row's image, at least one"
        checks.require(bool(known.all()), "gk_contrast_label", wanted, "a row with others")

    @cached_property
    def counts(self) -> Tensor:
        """int64 [len(COUNTS)]: what this batch adds to each of COUNTS."""
        return _counts(vars(self))


class CountRule(NamedTuple):
    """Which entries of some fields a count counts: `counted(*tensors)` is true for them."""

    of: tuple[str, ...]
    counted: Callable[..., Tensor]


def _given(x: Tensor) -> Tensor:
    return x >= 0


def _first_of_images(image: Tensor, columns: Tensor) -> Tensor:
    """bool [B, C]: as many entries as the visual tokens of each row are of images."""
    own = image.gather(1, columns.clamp(min=0).long())
    ordered = torch.where(columns >= 0, own, -1).sort(1).values
    before = torch.nn.functional.pad(ordered, (1, 0), value=-1)[:, :-1]
    return (ordered >= 0) & (ordered != before)


COUNT_RULES: dict[str, CountRule] = {
    "text": CountRule(("text_position",), _given),
    "word": CountRule(("word_position",), _given),
    "map": CountRule(("map_position",), _given),
    "aligned": CountRule(("side_position",), _given),
    "visual": CountRule(("image",), _given),
    "labelled_image": CountRule(("word_bag",), lambda bag: (bag >= 0).any(-1)),
    "phrase": CountRule(("phrase_position",), _given),
    "subject": CountRule(
        ("phrase_position", "phrase_subject"), lambda p, own: (p >= 0) & (own > 0)
    ),
    "composite": CountRule(("phrase_composite",), lambda three: (three >= 0).all(-1)),
    "raise": CountRule(("lens_position", "lens_inside"), lambda p, own: (p >= 0) & (own > 0)),
    "suppress": CountRule(("lens_position", "lens_inside"), lambda p, own: (p >= 0) & (own == 0)),
    "policy": CountRule(("policy_position",), _given),
    "image": CountRule(("image", "map_columns"), _first_of_images),
    "contrast": CountRule(("contrast_position",), _given),
    "contrast_word": CountRule(("contrast_bag",), _given),
}
COUNTS = tuple(COUNT_RULES)
"""What the sums of the terms are divided by, in the order of `gk_totals`."""


def row_counts(batch: Mapping[str, Tensor]) -> Tensor:
    """How many rows of each kind a batch has; a kind that is not there counts 0.

    Summed over the micro-batches of a step, and over ranks, it is the step's `gk_totals`.

    Args:
        batch: a collated batch, with or without `gk_` tensors.

    Returns:
        int64 [len(COUNTS)], in the order of COUNTS; the first counts the trained text tokens.
    """
    given = {name: batch[f"gk_{name}"] for name in FIELDS if f"gk_{name}" in batch}
    return _counts({**dict.fromkeys(FIELDS), **given, **weightless_rows_as_padding(given)})


def shielded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with weights as the integers of their bits, which nothing rounds.

    FSDP and DeepSpeed cast every float of a model's inputs to the dtype that it computes in.

    Args:
        batch: a collated batch, with or without `gk_` tensors.

    Returns:
        What an attached model takes in the place of the batch.
    """
    whole = dict(batch)
    for key in [f"gk_{name}" for name, spec in FIELDS.items() if spec.absent is not None]:
        if key in whole:
            whole[f"{key}{_BITS}"] = whole.pop(key).float().view(torch.int32)
    return whole


def without_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with nothing to learn: no trained token, region, word, map or phrase.

    Args:
        batch: a collated batch, with `labels`.

    Returns:
        The batch, every tensor in the shape it had; tensors that hold no supervision are shared.
    """
    blank = dict(batch, labels=torch.full_like(batch["labels"], -100))
    for name, spec in FIELDS.items():
        key = f"gk_{name}"
        if key in batch and spec.supervises:
            blank[key] = torch.full_like(batch[key], spec.padding)
    return blank


def _counts(tensors: Mapping[str, Tensor | None]) -> Tensor:
    device = next((x.device for x in tensors.values() if x is not None), None)
    counts = []
    for rule in COUNT_RULES.values():
        read = [tensors[name] for name in rule.of]
        if any(x is None for x in read):
            counts.append(torch.zeros((), dtype=torch.int64, device=device))
        else:
            counts.append(rule.counted(*read).sum())
    return torch.stack(counts)


def _check_groups(given: Mapping[str, Tensor]) -> None:
    """A group of tensors comes whole, but for what has a value where it is absent; all but the rows
    of text and policy need `gk_image`."""
    groups: dict[str, list[str]] = {}
    for name in FIELDS:
        groups.setdefault(name.partition("_")[0], []).append(name)
    for group, members in groups.items():
        if group in ("image", "text"):
            continue
        present = [name for name in members if name in given]
        needed = members if group == "policy" else (*members, "image")
        for name in needed if present else ():
            if name not in given and FIELDS[name].absent is None:
                checks.fail(f"gk_{name}", f"a tensor, since gk_{present[0]} is given", "nothing")


def _check_range(name: str, x: Tensor, stop: int) -> None:
    if x.numel():
        low, high = int(x.min()), int(x.max())
        checks.require(
            low >= -1 and high < stop, name, f"values in [-1, {stop})", f"[{low}, {high}]"
        )


def _check_finite(name: str, x: Tensor, least: float) -> None:
    bad = ~((x >= least) & x.isfinite())
    if bool(bad.any()):
        checks.fail(name, f"finite numbers, {least:g} or more", float(x[bad][0]))
