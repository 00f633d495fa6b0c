"""Examples to sequences of tokens, by a processor: which characters are in which token, and where
each visual token is.

What the sequences supervise is the collator's, which calls this once for a padded batch and once
for each sample of a packed one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import BatchFeature

from groundkern.checks import fail, require
from groundkern.hf.data.calling import (
    call,
    in_dtype_of,
    laid_out,
    placeholder,
    video_placeholder,
)
from groundkern.hf.data.example import GroundedExample
from groundkern.hf.data.geometry import Geometry, image_geometry
from groundkern.hf.data.geometry.videos import check_videos, video_geometry
from groundkern.hf.data.image_token import image_token_id, video_token_id
from groundkern.hf.data.layout import Layout, tokens_that_stay
from groundkern.hf.data.merging import check_merged, merge_features
from groundkern.hf.data.pictures import with_rgb_images
from groundkern.hf.data.processor import marks_prefix
from groundkern.hf.data.spans import (
    Chat,
    Expansion,
    TokenSpans,
    find_expansions,
    find_insertions,
    render_chat,
)
from groundkern.hf.data.texts import TextRules
from groundkern.hf.data.tokens import PER_TOKEN, without_padding
from groundkern.hf.data.visual import VisualTables, check_spans, visual_tokens

VISUAL = ("images", "videos")  # of an example


class Sequences(NamedTuple):
    """What was read of some samples."""

    per_token: dict[str, list[list[int]]]  # by names of PER_TOKEN, before truncation
    layouts: list[Layout]  # of each sample
    features: dict[str, Any]  # the tensors of all their images and videos


class SequenceReader:
    """Calls a processor and lays out what it returns.

    Args:
        processor, config, max_length, allowed_tokens, geometry: of `GroundingCollator`.

    Attributes:
        rules: what counts as a special token, by the tokenizer and the chat template.
        geometry: where visual tokens are.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        *,
        max_length: int | None,
        allowed_tokens: Sequence[str],
        geometry: Geometry | None,
    ) -> None:
        tokenizer = processor.tokenizer
        wanted = "a fast tokenizer, for its offsets"
        require(tokenizer.is_fast, "processor.tokenizer", wanted, "a slow one")
        require(tokenizer.pad_token_id is not None, "processor.tokenizer", "a pad token", None)
        positive = max_length is None or max_length > 0
        require(positive, "max_length", "a positive number or None", max_length)
        self.processor, self.config, self.max_length = processor, config, max_length
        self.geometry = geometry or partial(image_geometry, processor, config)
        self._placeholder = placeholder(processor)
        self._lists = getattr(processor, "skip_tensor_conversion", None)
        self._allowed = tuple(allowed_tokens)
        self.rules = TextRules(tokenizer, allowed=self._allowed)
        self._template: Any = None  # the one whose tokens `rules` know
        self._is_blank: dict[int, bool] = {}
        self._merges: set[str] = set()  # kinds that proved to be alike in samples and in a batch
        self._padding = marks_prefix(processor)  # it takes sequences of one length alone

    def chats(
        self, examples: Sequence[GroundedExample]
    ) -> tuple[list[GroundedExample], list[Chat]]:
        """Examples with RGB images, and their rendered chats.

        Args:
            examples: checked here.

        Raises:
            ValueError: a bad one, which the message names.
        """
        for example in examples:
            example.check()
        check_videos(
            self.config.model_type, [video for example in examples for video in example.videos]
        )
        examples = [with_rgb_images(example, name_of(example)) for example in examples]
        chats = [
            render_chat(self.processor, example.chat(), name_of(example), example.tools)
            for example in examples
        ]
        self._check_texts(examples, chats)
        return examples, chats

    def read(
        self, examples: Sequence[GroundedExample], chats: Sequence[Chat], counts: Counter[str]
    ) -> Sequences:
        """The sequences of some samples, by one call of the processor.

        Args:
            examples: the samples.
            chats: of `chats`.
            counts: adds to `samples`, `samples_truncated`, `tokens_truncated`.

        Raises:
            ValueError: a bad sample, which the message names, or a processor that does not fit.
        """
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
            insertions = find_insertions(chat.text, laid[b], name_of(example))
            spans = TokenSpans(offsets[b], expansions, partial(self._blank, ids), insertions)
            layouts.append(self._layout(example, chat, spans, ids, table, counts))
            _check_end(laid[b], expansions, offsets[b], name_of(example))
        return Sequences(per_token, layouts, self._tensors(features))

    def merged(self, reads: Sequence[Sequences]) -> dict[str, Any]:
        """The images and videos of samples that were read one by one, in their order.

        Args:
            reads: each of one sample.

        Raises:
            ValueError: a processor that treats them otherwise in a batch.
        """
        merged = merge_features(self.processor, [read.features for read in reads])
        layouts = [read.layouts[0] for read in reads]
        of = {kind: [x for x in layouts if getattr(x.example, kind)] for kind in VISUAL}
        new = {kind for kind, seen in of.items() if len(seen) > 1} - self._merges
        if new:  # proved once, on the first batch that can
            seen = [x for x in layouts if any(getattr(x.example, kind) for kind in VISUAL)]
            called = self._process([x.example for x in seen], [x.chat.text for x in seen])
            for name in ("offset_mapping", "text_replacement_offsets", *PER_TOKEN):
                called.pop(name, None)
            check_merged(self.processor, merged, self._tensors(called))
            self._merges |= new
        return merged

    def check_ids(self, where: str, ids: list[int]) -> None:
        """Refuse token ids that the model does not have.

        Args:
            where: what starts the message.
            ids: of tokens or labels.

        Raises:
            ValueError: there is one.
        """
        vocabulary = self.config.get_text_config().vocab_size
        wanted = f"token ids below the model's vocabulary of {vocabulary}"
        beyond = [i for i in ids if i >= vocabulary]
        require(not beyond, where, wanted, max(beyond, default=None))

    def _tensors(self, features: dict[str, Any]) -> dict[str, Any]:
        return dict(BatchFeature(dict(features)).convert_to_tensors("pt", self._lists))

    def _visual_token(self, example: GroundedExample) -> dict[str, int]:
        """The ids of visual tokens by their kind."""
        named = {"image": image_token_id(self.config, self.processor)}
        if example.videos:
            named["video"] = video_token_id(self.config, self.processor)
        wanted = "the id of visual tokens (set it on the model's config too)"
        found = {kind: index for kind, index in named.items() if index is not None}
        for kind in named:
            require(kind in found, f"config.{kind}_token_id", wanted, None)
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
            self.rules = TextRules(self.processor.tokenizer, self.processor, self._allowed)
            self._template = template
        for example, chat in zip(examples, chats, strict=True):
            there = {"image": len(example.images), "video": len(example.videos)}
            for kind, text in self._placeholders(example).items():
                found, wanted = chat.text.count(text), there[kind]
                what = f"{wanted} times {text!r} in the rendered chat, one per {kind}"
                require(found == wanted, f"{name_of(example)}: messages", what, found)
            self.rules.check(example, name_of(example))

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
                    wanted = "a sample that the processor takes"
                    fail(name_of(example), wanted, f"its error: {error}")
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
        counts: Counter[str],
    ) -> Layout:
        """One sequence, cut to `max_length`."""
        name, token, special = name_of(example), self._visual_token(example), self.rules.ids
        self.check_ids(f"{name}: messages", ids)
        stays = tokens_that_stay(ids, spans.images, special, self.max_length, name)
        counts["samples"] += 1
        counts["samples_truncated"] += len(stays) < len(ids)
        counts["tokens_truncated"] += len(ids) - len(stays)
        all_ids, ids = ids, [ids[i] for i in stays]
        visual = visual_tokens(tables, ids, token, name)
        check_spans(tables, spans, all_ids, token, name)
        return Layout(example, chat, spans, stays, ids, special, *visual)


def _check_end(
    laid: str, expansions: list[Expansion], offsets: list[tuple[int, int]], name: str
) -> None:
    """Refuse a processor that tokenised another text than the chat, as ShieldGemma2's does."""
    gained = expansions[-1].new_stop - expansions[-1].stop if expansions else 0
    behind = len(laid) + gained - max((stop for _, stop in offsets), default=0)
    same = behind >= 0 and not laid[max(0, len(laid) - behind) :].strip()
    require(same, f"{name}: processor", "one that tokenises the chats it is given", "another text")


def name_of(example: GroundedExample) -> str:
    """What error messages call an example."""
    return example.name or "example"
