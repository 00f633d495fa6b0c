"""`GroundingCollator`: grounded examples in, one batch with labels and `gk_` tensors out.

`sequences` calls the processor (once for a padded batch, once for each sample of a packed one) and
lays out each sequence. What a sequence supervises comes from `regions` (SMAM, KLAL), `words`
(DV-SFT) and `concepts` (HIST, logit lens); `padding` makes the batch, of rows that `packing` and
`merging` put together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.anchors import anchor_id, with_anchor
from groundkern.hf.data.concepts import contrast_rows, lens_rows, phrase_rows
from groundkern.hf.data.controls import CONTROLS, Controls, SampleRegions
from groundkern.hf.data.example import GroundedExample
from groundkern.hf.data.geometry import Geometry
from groundkern.hf.data.labels import WordEncoder
from groundkern.hf.data.layout import Layout, trained_positions
from groundkern.hf.data.merging import check_of_images
from groundkern.hf.data.packing import join_fields, join_tokens, rows_of
from groundkern.hf.data.padding import SampleFields, pad_fields, padded_length
from groundkern.hf.data.processor import marks_prefix
from groundkern.hf.data.regions import (
    EMPTY_REGION,
    MAP_ROWS,
    MapTargets,
    map_rows,
    region_masks,
    side_rows,
)
from groundkern.hf.data.sequences import VISUAL, SequenceReader, Sequences, name_of
from groundkern.hf.data.spans import Chat
from groundkern.hf.data.tokens import TokenRows, padded_tokens, token_rows
from groundkern.hf.data.words import LABEL_BAGS, WordLabeler, word_rows


class _Read(NamedTuple):
    """What was read of some samples, what runs along with their tokens, and what they supervise."""

    sequences: Sequences
    tokens: TokenRows
    samples: list[SampleFields]


class GroundingCollator:
    """Turns `GroundedExample`s into the batch that an attached model takes.

    The batch holds what the processor returns, `labels` (not shifted, -100: not trained; every
    assistant text and the special token that ends its turn are, but those with `"train": False`),
    and all the `gk_` tensors of `GroundedBatch`, as docs/data/data-format.md lists them. Integers
    are padded with -1, bool with False; a width is 0 if no sample of the batch has such rows. With
    `pack_to` a row holds several samples: it has `position_ids` (`packing`) and no mask, is padded
    on the right whatever the tokenizer does, and images are in the order of the rows.

    `counts` (a Counter) adds up what was found and what was lost: `samples`, `samples_truncated`,
    `tokens_truncated`, `text_rows`; `tokens` that are not padding, `tokens_laid` (with the padding
    of the batches as they were made), `tokens_padded` (as if each sample had a row of its own,
    padded to the longest); `answers`, `answers_empty` (no visible text, so that only the
    end of the turn is trained), `answers_truncated` (nothing of its text is left),
    `answers_untrained` (context: `"train": False`, as their `regions_untrained` and
    `phrases_untrained`); `regions`, `regions_truncated` (some of its text was cut),
    `regions_outside` (on no visual token);
    `side_rows`, `side_rows_without_region`, `side_rows_on_image` (the row would be an image token);
    `map_rows`, `map_rows_truncated`, `map_rows_without_target`, `map_rows_on_image`,
    `map_rows_left_out` (beyond `max_map_rows`); `regions_gated`, `words_gated`, `phrases_gated` (of
    weight 0); `phrases`, `phrases_truncated`,
    `phrase_rows`, `subject_rows`, `composites`; `lens_rows`, `lens_rows_inside`;
    `contrast_rows`, `contrast_words`, `contrast_words_alone`; `visual_tokens`;
    `words`, `word_rows`, `words_shared_token`, `words_dropped_` with `blank`, `punctuation`,
    `special`, `unknown`, `fragment`, `number`, `long`, `tall` or `outside`, and of those that have
    a label `words_useless_` with `blank`, `fragment`, `punctuation` or `digit`;
    `lens_dropped_` and `contrast_dropped_` as words, with `digit`. A worker process of a
    DataLoader counts for itself.

    Args:
        processor: the model's processor, with a fast tokenizer, a chat template and a pad token.
        config: the model's config.
        max_length: tokens per sample at most; text is cut from the end, images never are.
        pack_to: put samples one behind the other into rows of at most so many tokens (`packing`);
            None: each sample is a row, padded to the longest. A number that no batch reaches, such
            as 1_000_000_000, makes one row without padding, which others call padding-free.
        pad_to_multiple_of: what lengths are a multiple of, by padding on the right; 1: of anything.
        leading_space, byte_fragments, strip_punctuation, number_label, word_label: see
            `WordEncoder`.
        max_label_tokens, max_number_tokens, max_word_patches, on_shared_token: see `WordLabeler`.
        allowed_tokens: special tokens that texts of messages may hold (`TextRules`), such as
            Qwen2-VL's "<|box_start|>".
        label_bag: an image's labels are its "distinct" ones, or the "multiset" of all of them.
        map_kind, map_levels, map_sigma: see `groundkern.maps.target_map`.
        map_rows: one of `regions.MAP_ROWS` (`regions.map_rows`).
        anchor_token: the token whose rows are those of `map_rows="anchor"`; texts may hold it.
        query_tokens: make `gk_query_position`, which head weights of each row are found with
            (`Klal.head_weight` "sink" and "pattern").
        map_floor: the part of each target map that is spread evenly over its image, in [0, 1].
        max_map_rows: map rows of an answer and image at most, evenly spread; None: all.
        empty_region: an aligned token whose regions hold no visual token is left out ("skip") or
            sees "language" tokens alone.
        region_dilation: visual tokens by which a region grows on all sides for SMAM's sets; targets
            of maps do not grow.
        keep_registers: SMAM's sets also have the visual tokens without a place of their own (`keep`
            of `Smam`).
        side_control, map_control: None, or one of `controls.CONTROLS`: SMAM's sets, and targets of
            maps, are those of wrong regions (`control` of `Smam` and `Klal`).
        control_pool: for "shuffled": `SampleRegions` of other samples.
        control_seed: of what a control draws.
        lens: make the rows of the logit-lens loss; concepts are the texts of regions.
        contrast: make those of patch-text contrast, of the same concepts.
        lens_outside: visual tokens off an object for each on it; None: all.
        geometry: of (images of each sample, what the processor returned), the places of their
            visual tokens as `image_geometry` returns them; None: `image_geometry`.

    Raises:
        ValueError: a processor without what is needed, or an unknown option; in a call, a bad
            example, which the message names.

    Source: the papers of SMAM, DV-SFT, KLAL, HIST and the logit-lens loss (docs/methods/index.md).
    """

    processor: Any
    config: Any
    max_length: int | None
    pack_to: int | None
    empty_region: str
    label_bag: str
    region_dilation: float
    keep_registers: bool
    side_control: str | None
    map_control: str | None
    controls: Controls
    lens: bool
    lens_outside: float | None
    contrast: bool

    def __init__(
        self,
        processor: Any,
        config: Any,
        *,
        max_length: int | None = None,
        pack_to: int | None = None,
        pad_to_multiple_of: int = 1,
        leading_space: bool = True,
        max_label_tokens: int = 3,
        max_word_patches: float = 3,
        on_shared_token: str = "drop",
        byte_fragments: str = "drop",
        strip_punctuation: bool = True,
        number_label: str = "several",
        word_label: str = "first",
        max_number_tokens: int = 12,
        allowed_tokens: Sequence[str] = (),
        map_kind: str = "neighbours",
        label_bag: str = "distinct",
        map_levels: tuple[float, float, float] = (1.0, 0.5, 1e-3),
        map_sigma: float = 0.8,
        map_rows: str = "predictor",
        anchor_token: str | None = None,
        query_tokens: bool = False,
        map_floor: float = 0.0,
        max_map_rows: int | None = None,
        empty_region: str = "skip",
        region_dilation: float = 0.0,
        keep_registers: bool = False,
        side_control: str | None = None,
        map_control: str | None = None,
        control_pool: Sequence[SampleRegions | None] | None = None,
        control_seed: int = 0,
        lens: bool = False,
        contrast: bool = False,
        lens_outside: float | None = 1.0,
        geometry: Geometry | None = None,
    ) -> None:
        positive = pack_to is None or pack_to > 0
        require(positive, "pack_to", "a positive number or None", pack_to)
        require(pad_to_multiple_of > 0, "pad_to_multiple_of", "above 0", pad_to_multiple_of)
        require(0.0 <= map_floor <= 1.0, "map_floor", "a number in [0, 1]", map_floor)
        positive = max_map_rows is None or max_map_rows > 0
        require(positive, "max_map_rows", "a positive number or None", max_map_rows)
        cut = pack_to is None or max_length is None or max_length <= pack_to
        require(cut, "max_length", f"at most pack_to, which is {pack_to}", max_length)
        for name, value, known in (
            ("label_bag", label_bag, LABEL_BAGS),
            ("map_rows", map_rows, MAP_ROWS),
            ("empty_region", empty_region, EMPTY_REGION),
            ("side_control", side_control, (None, *CONTROLS)),
            ("map_control", map_control, (None, *CONTROLS)),
        ):
            require(value in known, name, " or ".join(map(repr, known)), repr(value))
        finite = 0 <= region_dilation < float("inf")
        require(finite, "region_dilation", "a number of visual tokens >= 0", region_dilation)
        pooled = "shuffled" not in (side_control, map_control) or bool(control_pool)
        require(pooled, "control_pool", "regions of other samples with 'shuffled'", control_pool)
        self._reader = SequenceReader(
            processor,
            config,
            max_length=max_length,
            allowed_tokens=with_anchor(processor.tokenizer, allowed_tokens, anchor_token),
            geometry=geometry,
        )
        there = map_rows != "anchor" or anchor_token is not None
        require(there, "anchor_token", "a token beside map_rows 'anchor'", anchor_token)
        anchor = None if anchor_token is None else anchor_id(processor.tokenizer, anchor_token)
        self._targets = MapTargets(
            map_kind,
            cast("tuple[float, float, float]", tuple(map_levels)),
            map_sigma,
            map_rows,
            anchor=anchor,
            queries=query_tokens,
            complement=map_control == "complement",
            floor=map_floor,
            most=max_map_rows,
        )
        self.processor, self.config = processor, config
        self.max_length, self.pack_to = max_length, pack_to
        self.multiple = pad_to_multiple_of
        self.empty_region, self.label_bag = empty_region, label_bag
        self.region_dilation, self.keep_registers = region_dilation, keep_registers
        self.side_control, self.map_control = side_control, map_control
        self.controls = Controls(control_pool, control_seed)
        self.lens, self.lens_outside, self.contrast = lens, lens_outside, contrast
        self.counts: Counter[str] = Counter()
        self._marks_prefix = marks_prefix(processor)
        self._encoder = WordEncoder(
            processor.tokenizer,
            leading_space=leading_space,
            byte_fragments=byte_fragments,
            strip_punctuation=strip_punctuation,
            number_label=number_label,
            word_label=word_label,
            rules=self._reader.rules,
        )
        self._labeler = WordLabeler(
            self._encoder, max_label_tokens, max_number_tokens, max_word_patches, on_shared_token
        )

    @property
    def geometry(self) -> Geometry:
        """Where the visual tokens of images are."""
        return self._reader.geometry

    def __call__(self, examples: Sequence[GroundedExample]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            examples: one or more.

        Returns:
            Keyword inputs of the model, on the CPU.

        Raises:
            ValueError: no example, or a bad one, which the message names.
        """
        require(len(examples) > 0, "examples", "at least one", "none")
        examples, chats = self._reader.chats(examples)
        if self._reader.rules is not self._encoder.rules:
            self._encoder.use(self._reader.rules)
        if self.pack_to is None:
            return self._padded(self._read(examples, chats))
        return self._packed([self._read([each], [chat]) for each, chat in zip(examples, chats)])

    def _read(self, examples: Sequence[GroundedExample], chats: Sequence[Chat]) -> _Read:
        """What one call of the processor says of some samples, and what these supervise."""
        found = self._reader.read(examples, chats, self.counts)
        samples = [self._fields(layout) for layout in found.layouts]
        known = found.per_token, found.layouts, samples
        tokens = token_rows(*known, marks_prefix=self._marks_prefix)
        if self.pack_to is not None:
            check_of_images(found.features, len(found.per_token["input_ids"][0]))
        return _Read(found, tokens, samples)

    def _padded(self, read: _Read) -> dict[str, Tensor]:
        """Each sample in a row of its own."""
        lengths = [len(layout.ids) for layout in read.sequences.layouts]
        self._count_tokens(lengths, lengths)
        left = self.processor.tokenizer.padding_side == "left" and self.multiple == 1
        how: dict[str, Any] = {"left": left, "multiple": self.multiple}
        return {
            **padded_tokens(read.tokens, self.processor.tokenizer.pad_token_id, **how),
            **read.sequences.features,
            **pad_fields(read.samples, lengths, **how),
        }

    def _packed(self, reads: Sequence[_Read]) -> dict[str, Tensor]:
        """Several samples in each row, and their images in the order of the rows."""
        assert self.pack_to is not None
        layouts = [layout for read in reads for layout in read.sequences.layouts]
        lengths = [len(layout.ids) for layout in layouts]
        for layout, length in zip(layouts, lengths):
            where, wanted = f"{name_of(layout.example)}: pack_to", f"at least its {length} tokens"
            require(length <= self.pack_to, where, wanted, self.pack_to)
        rows = rows_of(lengths, self.pack_to)
        names = reads[0].tokens
        tokens = join_tokens(
            {name: [read.tokens[name][0] for read in reads] for name in names}, rows
        )
        fields = [
            join_fields(
                [reads[i].samples[0] for i in row],
                [lengths[i] for i in row],
                [sum(len(getattr(layouts[i].example, kind)) for kind in VISUAL) for i in row],
            )
            for row in rows
        ]
        laid = [sum(lengths[i] for i in row) for row in rows]
        self._count_tokens(lengths, laid)
        how: dict[str, Any] = {"left": False, "multiple": self.multiple}
        return {
            **padded_tokens(tokens, self.processor.tokenizer.pad_token_id, **how),
            **self._reader.merged([reads[i].sequences for row in rows for i in row]),
            **pad_fields(fields, laid, **how),
        }

    def _count_tokens(self, lengths: list[int], laid: list[int]) -> None:
        self.counts["tokens"] += sum(lengths)
        self.counts["tokens_padded"] += len(lengths) * max(lengths)
        self.counts["tokens_laid"] += len(laid) * padded_length(laid, self.multiple)

    def _fields(self, layout: Layout) -> SampleFields:
        """What one sequence supervises."""
        counts = self.counts
        text = [p - 1 for p in trained_positions(layout, counts)]
        counts["text_rows"] += len(text)
        counts["visual_tokens"] += len(layout.visual)
        image = torch.full((len(layout.ids),), -1)
        image[layout.visual] = layout.table[:, 0].long()
        masks = region_masks(layout, counts)
        fields = {"image": image, "text_position": text, "map_columns": layout.visual}
        fields |= self._side_rows(layout, masks)
        example = layout.example
        weight = example.grounding_weight
        words = self._labeler.place(example.words, layout.table, counts, weight=weight)
        ids = [label.token for word in words for label in word.labels]
        self._reader.check_ids(f"{name_of(example)}: words", ids)
        fields |= word_rows(layout, words, self.label_bag)
        fields |= map_rows(self._controlled(layout, self.map_control), self._targets, counts)
        fields |= phrase_rows(layout, counts)
        if self.lens:
            fields |= lens_rows(layout, masks, self._encoder.encode, self.lens_outside, counts)
        if self.contrast:
            fields |= contrast_rows(layout, masks, self._encoder.encode, counts)
        return fields

    def _side_rows(self, layout: Layout, masks: list[Tensor]) -> SampleFields:
        """SMAM's rows; `masks` are those of the right regions as they are."""
        shown = self._controlled(layout, self.side_control)
        if shown is not layout or self.region_dilation:
            masks = region_masks(shown, Counter(), self.region_dilation)
        return side_rows(
            shown,
            masks,
            self.counts,
            self.empty_region,
            complement=self.side_control == "complement",
            registers=self.keep_registers,
        )

    def _controlled(self, layout: Layout, control: str | None) -> Layout:
        """The sequence with the regions of a control; the complement is made of the right ones."""
        example = self.controls.applied(layout.example, control)
        return layout if example is layout.example else replace(layout, example=example)
