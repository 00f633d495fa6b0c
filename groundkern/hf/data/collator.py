"""`GroundingCollator`: grounded examples in, one padded batch with labels and `gk_` tensors out.

This file calls the processor once for the whole batch and lays out each sequence. What a sequence
supervises comes from `regions` (SMAM, KLAL), `words` (DV-SFT) and `concepts` (HIST, logit lens);
`padding` makes the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from groundkern.checks import fail, require
from groundkern.hf.data.calling import call, laid_out, placeholder
from groundkern.hf.data.concepts import lens_rows, phrase_rows
from groundkern.hf.data.example import GroundedExample
from groundkern.hf.data.geometry import Geometry, image_geometry
from groundkern.hf.data.image_token import image_token_id
from groundkern.hf.data.labels import WordEncoder
from groundkern.hf.data.layout import Layout, tokens_that_stay, trained_positions
from groundkern.hf.data.padding import SampleFields, pad_fields, pad_tokens
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
from groundkern.hf.data.words import LABEL_BAGS, WordLabeler, word_rows

# what the processor returns per token, and the value that pads it (None: the tokenizer's)
_PER_TOKEN = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "moe_mm_token_type_ids": 0,
}


class GroundingCollator:
    """Turns `GroundedExample`s into the batch that an attached model takes.

    The batch holds what the processor returns, `labels` (not shifted, -100: not trained; every
    assistant text and the special token that ends its turn are, but those with `"train": False`),
    and all the `gk_` tensors of `GroundedBatch`, as docs/data-format.md lists them. Integers are
    padded with -1, bool with False; a width is 0 if no sample of the batch has such rows.

    `counts` (a Counter) adds up what was found and what was lost: `samples`, `samples_truncated`,
    `tokens_truncated`, `text_rows`; `answers`, `answers_empty` (no visible text, so that only the
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
        max_length: tokens per sequence at most; text is cut from the end, images never are.
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
        self.max_length = max_length
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
        examples = [with_rgb_images(example, _name(example)) for example in examples]
        chats = [
            render_chat(self.processor, example.chat(), _name(example), example.tools)
            for example in examples
        ]
        self._check_texts(examples, chats)
        texts = [chat.text for chat in chats]
        features = self._process(examples, texts)
        laid = laid_out(self.processor, [list(example.images) for example in examples], texts)
        offsets = features.pop("offset_mapping")
        wanted = f"one that makes {len(examples)} sequences of {len(examples)} chats"
        require(len(offsets) == len(examples), "processor", wanted, len(offsets))
        replaced = features.pop("text_replacement_offsets", None) or [None] * len(examples)
        tables = self.geometry([example.images for example in examples], features)
        per_token = {key: features.pop(key) for key in _PER_TOKEN if key in features}
        layouts = []
        for b, (example, chat, table) in enumerate(zip(examples, chats, tables)):
            tokens = [int((table[:, 0] == image).sum()) for image in range(len(example.images))]
            expansions = find_expansions(chat.text, self._placeholder, tokens, replaced[b])
            ids = per_token["input_ids"][b]
            insertions = find_insertions(chat.text, laid[b], _name(example))
            spans = TokenSpans(offsets[b], expansions, partial(self._blank, ids), insertions)
            layouts.append(self._layout(example, chat, spans, ids, table))
            _check_end(laid[b], expansions, offsets[b], _name(example))
        samples = [self._fields(layout) for layout in layouts]
        left = self.processor.tokenizer.padding_side == "left"
        return {
            **self._tokens(per_token, layouts, samples, left),
            **BatchFeature(dict(features)).convert_to_tensors("pt", self._lists),
            **pad_fields(samples, [len(layout.ids) for layout in layouts], left=left),
        }

    def _image_token(self) -> int:
        found = image_token_id(self.config, self.processor)
        wanted = "the id of visual tokens (set it on the model's config too)"
        require(found is not None, "config.image_token_id", wanted, None)
        return found

    def _check_texts(self, examples: Sequence[GroundedExample], chats: Sequence[Chat]) -> None:
        """Refuse messages that hold more than text, above all more placeholders than images."""
        template = self.processor.chat_template
        if template != self._template:
            self._rules = TextRules(self.processor.tokenizer, self.processor, self._allowed)
            self._encoder.use(self._rules)
            self._template = template
        for example, chat in zip(examples, chats, strict=True):
            found, wanted = chat.text.count(self._placeholder), len(example.images)
            what = f"{wanted} times {self._placeholder!r} in the rendered chat, one per image"
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
        """One call of the processor: lists per token, arrays per image."""
        images = [example.images for example in examples]
        try:
            features = call(self.processor, images, texts, padding=self._padding)
        except ValueError:  # such as an image too narrow for its family: whose is it?
            for example, text in zip(examples, texts):
                try:
                    call(self.processor, [example.images], [text])
                except ValueError as error:
                    fail(_name(example), "a sample that the processor takes", f"its error: {error}")
            if self._padding:
                raise
            self._padding = True  # each alone is fine: Ernie's makes an array of the sequences
            features = call(self.processor, images, texts, padding=self._padding)
        for key, x in features.items():  # Llama 4's images are bfloat16 whatever its model is
            if isinstance(x, Tensor) and x.dtype == torch.bfloat16:
                features[key] = x.to(getattr(self.config, "dtype", None) or torch.float32)
        return _without_padding(features) if self._padding else features

    def _layout(
        self, example: GroundedExample, chat: Chat, spans: TokenSpans, ids: list[int], table: Tensor
    ) -> Layout:
        """One sequence, cut to `max_length`."""
        name, image_token, special = _name(example), self._image_token(), self._rules.ids
        self._check_ids(f"{name}: messages", ids)
        stays = tokens_that_stay(ids, spans.images, special, self.max_length, name)
        self.counts["samples"] += 1
        self.counts["samples_truncated"] += len(stays) < len(ids)
        self.counts["tokens_truncated"] += len(ids) - len(stays)
        all_ids, ids = ids, [ids[i] for i in stays]
        visual = torch.tensor([i for i, token in enumerate(ids) if token == image_token]).long()
        if len(visual) != len(table):
            wanted = f"{len(table)} visual tokens by the processor's settings"
            fail(f"{name}: images", wanted, len(visual))
        for image, span in enumerate(spans.images):
            there = sum(all_ids[i] == image_token for i in span)
            tokens = int((table[:, 0] == image).sum())
            require(there == tokens, f"{name}: images[{image}]", f"{tokens} visual tokens", there)
        return Layout(example, chat, spans, stays, ids, special, visual, table)

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

    def _tokens(
        self,
        per_token: dict[str, list],
        layouts: list[Layout],
        samples: list[SampleFields],
        left: bool,
    ) -> dict[str, Tensor]:
        """input_ids and what runs along with it, and labels: int64 [B, S]."""
        batch = {}
        for key, values in per_token.items():
            fill = _PER_TOKEN[key]
            fill = self.processor.tokenizer.pad_token_id if fill is None else fill
            rows = [[row[i] for i in layout.stays] for row, layout in zip(values, layouts)]
            if key == "token_type_ids" and self._marks_prefix:
                rows = [_suffix(row, sample["text_position"]) for row, sample in zip(rows, samples)]
            batch[key] = pad_tokens(rows, fill, left=left)
        labels = []
        for layout, sample in zip(layouts, samples):
            labels.append([-100] * len(layout.ids))
            for p in sample["text_position"]:
                labels[-1][p + 1] = layout.ids[p + 1]
        batch["labels"] = pad_tokens(labels, -100, left=left)
        return batch


def _without_padding(features: dict[str, Any]) -> dict[str, Any]:
    """The same with lists per token as long as each sequence."""
    keep = [[i for i, real in enumerate(row) if real] for row in features["attention_mask"]]
    cut = dict(features)
    for key in ("offset_mapping", *_PER_TOKEN):
        if key in cut:
            cut[key] = [[row[i] for i in kept] for row, kept in zip(cut[key], keep)]
    cut.pop("labels", None)  # of PaliGemma's
    return cut


def _check_end(
    laid: str, expansions: list[Expansion], offsets: list[tuple[int, int]], name: str
) -> None:
    """Refuse a processor that tokenised another text than the chat, as ShieldGemma2's does."""
    gained = expansions[-1].new_stop - expansions[-1].stop if expansions else 0
    behind = len(laid) + gained - max((stop for _, stop in offsets), default=0)
    same = behind >= 0 and not laid[max(0, len(laid) - behind) :].strip()
    require(same, f"{name}: processor", "one that tokenises the chats it is given", "another text")


def _suffix(row: list[int], text_position: list[int]) -> list[int]:
    """0 up to the first token to learn, 1 from there: it and all that follow see no later one."""
    first = text_position[0] + 1 if text_position else len(row)
    return [int(position >= first) for position in range(len(row))]


def _name(example: GroundedExample) -> str:
    return example.name or "example"
