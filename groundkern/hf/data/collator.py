"""`GroundingCollator`: grounded examples in, one batch with labels and `gk_` tensors out.

This file calls the processor (once for a padded batch, once for each sample of a packed one) and
lays out each sequence. What a sequence supervises comes from `regions` (SMAM, KLAL), `words`
(DV-SFT) and `concepts` (HIST, logit lens); `padding` makes the batch, of rows that `packing` and
`merging` put together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchFeature

from groundkern.checks import fail, require
from groundkern.hf.data.calling import (
    call,
    in_dtype_of,
    laid_out,
    placeholder,
    video_placeholder,
)
from groundkern.hf.data.concepts import lens_rows, phrase_rows
from groundkern.hf.data.example import GroundedExample
from groundkern.hf.data.geometry import Geometry, image_geometry
from groundkern.hf.data.geometry.videos import check_videos, video_geometry
from groundkern.hf.data.image_token import image_token_id, video_token_id
from groundkern.hf.data.labels import WordEncoder
from groundkern.hf.data.layout import Layout, tokens_that_stay, trained_positions
from groundkern.hf.data.merging import check_merged, check_of_images, merge_features
from groundkern.hf.data.packing import join_fields, join_tokens, rows_of
from groundkern.hf.data.padding import SampleFields, pad_fields, padded_length
from groundkern.hf.data.pictures import with_rgb_images
from groundkern.hf.data.processor import marks_prefix
from groundkern.hf.data.regions import EMPTY_REGION, MAP_ROWS, map_rows, region_masks, side_rows
from groundkern.hf.data.spans import (
    Chat,
    Expansion,
    TokenSpans,
    find_expansions,
    find_insertions,
    render_chat,
)
from groundkern.hf.data.texts import TextRules
from groundkern.hf.data.tokens import (
    PER_TOKEN,
    TokenRows,
    padded_tokens,
    token_rows,
    without_padding,
)
from groundkern.hf.data.visual import VisualTables, check_spans, visual_tokens
from groundkern.hf.data.words import LABEL_BAGS, WordLabeler, word_rows

_VISUAL = ("images", "videos")  # of an example


class _Read(NamedTuple):
    """What was read of some samples: of each, what runs along with its tokens, its layout and what
    it supervises; and the tensors of all their images and videos."""

    tokens: TokenRows
    layouts: list[Layout]
    samples: list[SampleFields]
    features: dict[str, Any]


class GroundingCollator:
    """Turns `GroundedExample`s into the batch that an attached model takes.

    The batch holds what the processor returns, `labels` (not shifted, -100: not trained; every
    assistant text and the special token that ends its turn are, but those with `"train": False`),
    and all the `gk_` tensors of `GroundedBatch`, as docs/data-format.md lists them. Integers are
    padded with -1, bool with False; a width is 0 if no sample of the batch has such rows. With
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
    `map_rows`, `map_rows_truncated`, `map_rows_without_target`, `map_rows_on_image`; `phrases`,
    `phrases_truncated`,
    `phrase_rows`, `subject_rows`, `composites`; `lens_rows`, `lens_rows_inside`;
    `words`, `word_rows`, `words_shared_token`, `words_dropped_` with `blank`, `punctuation`,
    `special`, `unknown`, `fragment`, `number`, `long`, `tall` or `outside`, and of those that have
    a label `words_useless_` with `blank`, `fragment`, `punctuation` or `digit`;
    `lens_dropped_` as words, with `digit`. A worker process of a DataLoader counts for itself.

    Args:
        processor: the model's processor, with a fast tokenizer, a chat template and a pad token.
        config: the model's config.
        max_length: tokens per sample at most; text is cut from the end, images never are.
        pack_to: put samples one behind the other into rows of at most so many tokens (`packing`);
            None: each sample is a row, padded to the longest. A number that no batch reaches, such
            as 1_000_000_000, makes one row without padding, which others call padding-free.
        pad_to_multiple_of: what lengths are a multiple of, by padding on the right; 1: of anything.
        leading_space, byte_fragments, strip_punctuation, number_label: see `WordEncoder`.
        max_label_tokens, max_number_tokens, max_word_patches, on_shared_token: see `WordLabeler`.
        allowed_tokens: special tokens that texts of messages may hold (`TextRules`), such as
            Qwen2-VL's "<|box_start|>".
        label_bag: an image's labels are its "distinct" ones, or the "multiset" of all of them.
        map_kind, map_levels: see `groundkern.maps.target_map`.
        map_rows: one of `regions.MAP_ROWS` (`regions.map_rows`).
        empty_region: an aligned token whose regions hold no visual token is left out ("skip") or
            sees "language" tokens alone.
        lens: make the rows of the logit-lens loss; concepts are the texts of regions.
        lens_outside: visual tokens off an object for each on it; None: all.
        geometry: of (images of each sample, what the processor returned), the places of their
            visual tokens as `image_geometry` returns them; None: `image_geometry`.

    Raises:
        ValueError: a processor without what is needed, or an unknown option; in a call, a bad
            example, which the message names.

    Source: the papers of SMAM, DV-SFT, KLAL, HIST and the logit-lens loss (docs/methods.md).
    """

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
        max_number_tokens: int = 12,
        allowed_tokens: Sequence[str] = (),
        map_kind: str = "neighbours",
        label_bag: str = "distinct",
        map_levels: tuple[float, float, float] = (1.0, 0.5, 1e-3),
        map_rows: str = "predictor",
        empty_region: str = "skip",
        lens: bool = False,
        lens_outside: float | None = 1.0,
        geometry: Geometry | None = None,
    ) -> None:
        tokenizer = processor.tokenizer
        wanted = "a fast tokenizer, for its offsets"
        require(tokenizer.is_fast, "processor.tokenizer", wanted, "a slow one")
        require(tokenizer.pad_token_id is not None, "processor.tokenizer", "a pad token", None)
        positive = max_length is None or max_length > 0
        require(positive, "max_length", "a positive number or None", max_length)
        positive = pack_to is None or pack_to > 0
        require(positive, "pack_to", "a positive number or None", pack_to)
        require(pad_to_multiple_of > 0, "pad_to_multiple_of", "above 0", pad_to_multiple_of)
        cut = pack_to is None or max_length is None or max_length <= pack_to
        require(cut, "max_length", f"at most pack_to, which is {pack_to}", max_length)
        for name, value, known in (
            ("label_bag", label_bag, LABEL_BAGS),
            ("map_rows", map_rows, MAP_ROWS),
            ("empty_region", empty_region, EMPTY_REGION),
        ):
            require(value in known, name, " or ".join(map(repr, known)), repr(value))
        self.processor = processor
        self.config = config
        self._placeholder = placeholder(processor)
        self._lists = getattr(processor, "skip_tensor_conversion", None)
        self.max_length, self.pack_to = max_length, pack_to
        self.multiple = pad_to_multiple_of
        self.map_kind = map_kind
        self.map_levels = map_levels
        self.map_rows, self.empty_region, self.label_bag = map_rows, empty_region, label_bag
        self.lens, self.lens_outside = lens, lens_outside
        self.geometry = geometry or partial(image_geometry, processor, config)
        self.counts: Counter[str] = Counter()
        self._marks_prefix = marks_prefix(processor)
        self._allowed = tuple(allowed_tokens)
        self._rules = TextRules(tokenizer, allowed=self._allowed)
        self._encoder = WordEncoder(
            tokenizer,
            leading_space=leading_space,
            byte_fragments=byte_fragments,
            strip_punctuation=strip_punctuation,
            number_label=number_label,
            rules=self._rules,
        )
        self._labeler = WordLabeler(
            self._encoder, max_label_tokens, max_number_tokens, max_word_patches, on_shared_token
        )
        self._template: Any = None  # the one whose tokens `_rules` know
        self._is_blank: dict[int, bool] = {}
        self._merges: set[str] = set()  # kinds that proved to be alike in samples and in a batch
        self._padding = self._marks_prefix  # it takes sequences of one length alone

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
        for example in examples:
            example.check()
        check_videos(
            self.config.model_type, [video for example in examples for video in example.videos]
        )
        examples = [with_rgb_images(example, _name(example)) for example in examples]
        chats = [
            render_chat(self.processor, example.chat(), _name(example), example.tools)
            for example in examples
        ]
        self._check_texts(examples, chats)
        if self.pack_to is None:
            return self._padded(self._read(examples, chats))
        return self._packed([self._read([each], [chat]) for each, chat in zip(examples, chats)])

    def _read(self, examples: Sequence[GroundedExample], chats: Sequence[Chat]) -> _Read:
        """What one call of the processor says of some samples."""
        texts = [chat.text for chat in chats]
        features = self._process(examples, texts)
        laid = laid_out(self.processor, [list(example.images) for example in examples], texts)
        offsets = features.pop("offset_mapping")
        wanted = f"one that makes {len(examples)} sequences of {len(examples)} chats"
        require(len(offsets) == len(examples), "processor", wanted, len(offsets))
        replaced = features.pop("text_replacement_offsets", None) or [None] * len(examples)
        tables = self._tables(examples, features)
        per_token = {key: features.pop(key) for key in PER_TOKEN if key in features}
        layouts = []
        for b, (example, chat, table) in enumerate(zip(examples, chats, tables)):
            tokens = {kind: table.tokens(kind) for kind in self._placeholders(example)}
            expansions = find_expansions(
                chat.text, self._placeholders(example), tokens, replaced[b]
            )
            ids = per_token["input_ids"][b]
            insertions = find_insertions(chat.text, laid[b], _name(example))
            spans = TokenSpans(offsets[b], expansions, partial(self._blank, ids), insertions)
            layouts.append(self._layout(example, chat, spans, ids, table))
            _check_end(laid[b], expansions, offsets[b], _name(example))
        samples = [self._fields(layout) for layout in layouts]
        tokens = token_rows(per_token, layouts, samples, marks_prefix=self._marks_prefix)
        images = self._tensors(features)
        if self.pack_to is not None:
            check_of_images(images, len(per_token["input_ids"][0]))
        return _Read(tokens, layouts, samples, images)

    def _tensors(self, features: dict[str, Any]) -> dict[str, Any]:
        return dict(BatchFeature(dict(features)).convert_to_tensors("pt", self._lists))

    def _padded(self, read: _Read) -> dict[str, Tensor]:
        """Each sample in a row of its own."""
        lengths = [len(layout.ids) for layout in read.layouts]
        self._count_tokens(lengths, lengths)
        left = self.processor.tokenizer.padding_side == "left" and self.multiple == 1
        how = {"left": left, "multiple": self.multiple}
        return {
            **padded_tokens(read.tokens, self.processor.tokenizer.pad_token_id, **how),
            **read.features,
            **pad_fields(read.samples, lengths, **how),
        }

    def _packed(self, reads: Sequence[_Read]) -> dict[str, Tensor]:
        """Several samples in each row, and their images in the order of the rows."""
        layouts = [layout for read in reads for layout in read.layouts]
        lengths = [len(layout.ids) for layout in layouts]
        for layout, length in zip(layouts, lengths):
            where, wanted = f"{_name(layout.example)}: pack_to", f"at least its {length} tokens"
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
                [sum(len(getattr(layouts[i].example, kind)) for kind in _VISUAL) for i in row],
            )
            for row in rows
        ]
        laid = [sum(lengths[i] for i in row) for row in rows]
        self._count_tokens(lengths, laid)
        how = {"left": False, "multiple": self.multiple}
        return {
            **padded_tokens(tokens, self.processor.tokenizer.pad_token_id, **how),
            **self._merged([reads[i] for row in rows for i in row]),
            **pad_fields(fields, laid, **how),
        }

    def _merged(self, reads: Sequence[_Read]) -> dict[str, Any]:
        """The images and videos of all samples, in their order."""
        merged = merge_features(self.processor, [read.features for read in reads])
        layouts = [read.layouts[0] for read in reads]
        of = {kind: [x for x in layouts if getattr(x.example, kind)] for kind in _VISUAL}
        new = {kind for kind, seen in of.items() if len(seen) > 1} - self._merges
        if new:  # proved once, on the first batch that can
            seen = [x for x in layouts if any(getattr(x.example, kind) for kind in _VISUAL)]
            called = self._process([x.example for x in seen], [x.chat.text for x in seen])
            for name in ("offset_mapping", "text_replacement_offsets", *PER_TOKEN):
                called.pop(name, None)
            check_merged(self.processor, merged, self._tensors(called))
            self._merges |= new
        return merged

    def _count_tokens(self, lengths: list[int], laid: list[int]) -> None:
        self.counts["tokens"] += sum(lengths)
        self.counts["tokens_padded"] += len(lengths) * max(lengths)
        self.counts["tokens_laid"] += len(laid) * padded_length(laid, self.multiple)

    def _visual_token(self, example: GroundedExample) -> dict[str, int]:
        """The ids of visual tokens by their kind."""
        found = {"image": image_token_id(self.config, self.processor)}
        if example.videos:
            found["video"] = video_token_id(self.config, self.processor)
        wanted = "the id of visual tokens (set it on the model's config too)"
        for kind, index in found.items():
            require(index is not None, f"config.{kind}_token_id", wanted, None)
        return found

    def _placeholders(self, example: GroundedExample) -> dict[str, str]:
        """What a chat template writes for an image, and for a video, by their kind."""
        found = {"image": self._placeholder}
        return found | {"video": video_placeholder(self.processor)} if example.videos else found

    def _tables(
        self, examples: Sequence[GroundedExample], features: dict[str, Any]
    ) -> list[VisualTables]:
        images = self.geometry([example.images for example in examples], features)
        of = [example.videos for example in examples]
        videos = video_geometry(self.processor, self.config, of, features)
        return [
            VisualTables(image, video, len(example.images), len(example.videos))
            for example, image, video in zip(examples, images, videos, strict=True)
        ]

    def _check_texts(self, examples: Sequence[GroundedExample], chats: Sequence[Chat]) -> None:
        """Refuse messages that hold more than text, above all more placeholders than images and
        videos."""
        template = self.processor.chat_template
        if template != self._template:
            self._rules = TextRules(self.processor.tokenizer, self.processor, self._allowed)
            self._encoder.use(self._rules)
            self._template = template
        for example, chat in zip(examples, chats, strict=True):
            there = {"image": len(example.images), "video": len(example.videos)}
            for kind, text in self._placeholders(example).items():
                found, wanted = chat.text.count(text), there[kind]
                what = f"{wanted} times {text!r} in the rendered chat, one per {kind}"
                require(found == wanted, f"{_name(example)}: messages", what, found)
            self._rules.check(example, _name(example))

    def _blank(self, ids: list[int], token: int) -> bool:
        """Whether a token of a sequence is white space alone."""
        index = ids[token]
        if index not in self._is_blank:
            text = self.processor.tokenizer.decode([index])
            self._is_blank[index] = not text.replace("\u2581", " ").strip()  # SentencePiece's space
        return self._is_blank[index]

    def _process(self, examples: Sequence[GroundedExample], texts: list[str]) -> dict[str, Any]:
        """One call of the processor: lists per token, arrays per image and per video."""
        seen = [example.images for example in examples], texts, [x.videos for x in examples]
        try:
            features = call(self.processor, *seen, padding=self._padding)
        except ValueError:  # such as an image too narrow for its family: whose is it?
            for example, text in zip(examples, texts):
                try:
                    call(self.processor, [example.images], [text], [example.videos])
                except ValueError as error:
                    fail(_name(example), "a sample that the processor takes", f"its error: {error}")
            if self._padding:
                raise
            self._padding = True  # each alone is fine: Ernie's makes an array of the sequences
            features = call(self.processor, *seen, padding=self._padding)
        features = in_dtype_of(self.config, features)
        return without_padding(features) if self._padding else features

    def _layout(
        self,
        example: GroundedExample,
        chat: Chat,
        spans: TokenSpans,
        ids: list[int],
        tables: VisualTables,
    ) -> Layout:
        """One sequence, cut to `max_length`."""
        name, token, special = _name(example), self._visual_token(example), self._rules.ids
        self._check_ids(f"{name}: messages", ids)
        stays = tokens_that_stay(ids, spans.images, special, self.max_length, name)
        self.counts["samples"] += 1
        self.counts["samples_truncated"] += len(stays) < len(ids)
        self.counts["tokens_truncated"] += len(ids) - len(stays)
        all_ids, ids = ids, [ids[i] for i in stays]
        visual = visual_tokens(tables, ids, token, name)
        check_spans(tables, spans, all_ids, token, name)
        return Layout(example, chat, spans, stays, ids, special, *visual)

    def _fields(self, layout: Layout) -> SampleFields:
        """What one sequence supervises."""
        counts = self.counts
        text = [p - 1 for p in trained_positions(layout, counts)]
        counts["text_rows"] += len(text)
        image = torch.full((len(layout.ids),), -1)
        image[layout.visual] = layout.table[:, 0].long()
        masks = region_masks(layout, counts)
        fields = {"image": image, "text_position": text, "map_columns": layout.visual}
        fields |= side_rows(layout, masks, counts, self.empty_region)
        words = self._labeler.place(layout.example.words, layout.table, counts)
        ids = [label.token for word in words for label in word.labels]
        self._check_ids(f"{_name(layout.example)}: words", ids)
        fields |= word_rows(layout, words, self.label_bag)
        fields |= map_rows(layout, self.map_kind, self.map_levels, counts, self.map_rows)
        fields |= phrase_rows(layout, counts)
        if self.lens:
            fields |= lens_rows(layout, masks, self._encoder.encode, self.lens_outside, counts)
        return fields

    def _check_ids(self, where: str, ids: list[int]) -> None:
        vocabulary = self.config.get_text_config().vocab_size
        wanted = f"token ids below the model's vocabulary of {vocabulary}"
        beyond = [i for i in ids if i >= vocabulary]
        require(not beyond, where, wanted, max(beyond, default=None))


def _check_end(
    laid: str, expansions: list[Expansion], offsets: list[tuple[int, int]], name: str
) -> None:
    """Refuse a processor that tokenised another text than the chat, as ShieldGemma2's does."""
    gained = expansions[-1].new_stop - expansions[-1].stop if expansions else 0
    behind = len(laid) + gained - max((stop for _, stop in offsets), default=0)
    same = behind >= 0 and not laid[max(0, len(laid) - behind) :].strip()
    require(same, f"{name}: processor", "one that tokenises the chats it is given", "another text")


def _name(example: GroundedExample) -> str:
    return example.name or "example"
