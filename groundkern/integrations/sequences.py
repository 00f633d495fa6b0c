"""Rows of sequences that another program has tokenised, truncated and batched already.

Nothing is tokenised anew. The tokens are decoded one after another, which says which characters
each of them stands for; the answers are looked for in that text; and a region's words are then the
tokens that overlap their characters. Trained tokens are those that the program gave labels.
"""

from __future__ import annotations

import logging
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from groundkern.checks import require
from groundkern.hf import GroundedExample, GroundingCollator
from groundkern.hf.data.example import message_text
from groundkern.hf.data.image_token import image_token_id, video_token_id
from groundkern.hf.data.layout import Layout
from groundkern.hf.data.padding import SampleFields, pad_fields
from groundkern.hf.data.spans import Chat, Piece, TokenSpans, Turn
from groundkern.hf.data.visual import VisualTables, visual_tokens

logger = logging.getLogger(__name__)

# In which a tokenizer may have kept a text.
FORMS: tuple[Literal["NFC", "NFKC"] | None, ...] = (None, "NFC", "NFKC")
UNTRAINED = -100


@dataclass(frozen=True)
class Picture:
    """What geometry asks of an image: (width, height) as the processor was given it."""

    size: tuple[int, int]

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]


class Found(NamedTuple):
    """An answer in a decoded sequence.

    Args:
        at: where its text begins.
        trained: whether its first token has a label.
    """

    at: int
    trained: bool


@dataclass(frozen=True)
class Decoded:
    """A sequence as text.

    Args:
        text: of all tokens but the visual ones.
        offsets: the characters of each token; the tokens of one character share them.
        labels: of each token.
    """

    text: str
    offsets: list[tuple[int, int]]
    labels: list[int]

    @cached_property
    def _ends(self) -> tuple[list[int], list[int], list[int]]:
        """Tokens that have characters, and the first and last of these."""
        seen = [i for i, (low, high) in enumerate(self.offsets) if low < high]
        return seen, [self.offsets[i][0] for i in seen], [self.offsets[i][1] for i in seen]

    def occurrences(self, text: str, start: int, stop: int) -> list[Found]:
        """Where a text has tokens of its own, but for white space at its ends.

        Args:
            text: visible at both ends.
            start, stop: the characters among which it is looked for.
        """
        seen, lows, highs = self._ends
        found, at = [], self.text.find(text, start, stop)
        while at >= 0:
            end = at + len(text)
            first, last = bisect_right(lows, at) - 1, bisect_left(highs, end)
            beside = self.text[lows[first] : at] + self.text[end : highs[last]]
            if not beside.strip():
                found.append(Found(at, self.labels[seen[first]] != UNTRAINED))
            at = self.text.find(text, at + 1, stop)
        return found


def decoded(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], visual: set[int]) -> Decoded:
    """What each token of a sequence stands for.

    Args:
        tokenizer: a fast one.
        ids, labels: of the sequence.
        visual: ids of visual tokens, which have no text.
    """
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    text, offsets, waiting = "", [], 0
    for index in ids:
        shown = None if index in visual else stream.step(backend, index)
        if index in visual:
            offsets += [(len(text), len(text))] * (waiting + 1)
            waiting = 0
        elif shown is None:  # a part of a character, of which the rest is to come
            waiting += 1
        else:
            offsets += [(len(text), len(text) + len(shown))] * (waiting + 1)
            text, waiting = text + shown, 0
    offsets += [(len(text), len(text))] * waiting
    return Decoded(text, offsets, list(labels))


class SequenceRows(GroundingCollator):
    """Makes the `gk_` tensors of batches that another program made.

    `counts` are those of `GroundingCollator`, and `answers_unfound`, `regions_unfound`: answers
    whose text is not whole in the sequence, such as those that were cut, and their regions.

    Args:
        processor, config, settings: of `GroundingCollator`.
    """

    def __call__(
        self,
        examples: Sequence[GroundedExample],
        batch: dict[str, Any],
        features: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The batch with its rows.

        Args:
            examples: of each row of the batch; images are what the processor was given, or a
                `Picture` of their size.
            batch: `input_ids`, `attention_mask` and `labels`, [B, S], and what else a model takes.
            features: what the processor returned of all images; None: they are in the batch.

        Returns:
            The same and all `gk_` tensors.

        Raises:
            ValueError: a sample that does not fit, which the message names; packed sequences.
        """
        ids: Tensor = batch["input_ids"]
        mask: Any = batch.get("attention_mask")
        flat = mask is not None and mask.dim() == 2 and len(ids) == len(examples)
        wanted = f"[{len(examples)}, S] with an attention mask, a sample in each row"
        require(flat, "input_ids", wanted, f"{list(ids.shape)}, packed or without a mask")
        kept = [row.bool() for row in mask]
        tables = self._places(examples, batch if features is None else features)
        fields = []
        for example, row, labels, keep, table in zip(
            examples, ids, batch["labels"], kept, tables, strict=True
        ):
            known = row[keep].tolist(), labels[keep].tolist()
            fields.append(self._of_sequence(example, *known, table))
        length = ids.shape[1]
        lengths = [int(keep.sum()) for keep in kept]
        left = any(bool(keep.any()) and not keep[0] for keep in kept)
        self._count_tokens(lengths, [length] * len(lengths))
        return {**batch, **pad_fields(fields, lengths, left=left, multiple=length)}

    def _places(
        self, examples: Sequence[GroundedExample], features: dict[str, Any]
    ) -> list[VisualTables]:
        """Where the visual tokens of each sample are, by one call."""
        images = [list(example.images) for example in examples]
        none = torch.zeros(0, 5, dtype=torch.float64)
        tables = self._reader.geometry(images, features) if any(images) else [none] * len(images)
        video = torch.zeros(0, 7, dtype=torch.float64)
        return [VisualTables(each, video, len(of), 0) for each, of in zip(tables, images)]

    def _of_sequence(
        self, example: GroundedExample, ids: list[int], labels: list[int], tables: VisualTables
    ) -> SampleFields:
        name = example.name or "example"
        token: dict[str, Any] = {"image": image_token_id(self.config, self.processor)}
        video = video_token_id(self.config, self.processor)
        require(video not in ids, f"{name}: videos", "none (images only)", "a video token")
        visual = visual_tokens(tables, ids, token, name)
        seen = decoded(self.processor.tokenizer, ids, labels, set(token.values()))
        unfound = self.counts["answers_unfound"]
        example, turns = located(example, seen, self.counts)
        if self.counts["answers_unfound"] and not unfound:
            logger.warning(
                "%s: an answer is not whole in its tokens (cut?): it has no rows, nor will others",
                name,
            )
        layout = Layout(
            example,
            Chat(seen.text, turns),
            TokenSpans(seen.offsets, [], partial(self._reader._blank, ids)),
            list(range(len(ids))),
            ids,
            self._reader.rules.ids,
            *visual,
        )
        self.counts["samples"] += 1
        fields = self._fields(layout)
        text = [p - 1 for p, label in enumerate(labels) if label != UNTRAINED and p > 0]
        self.counts["text_rows"] += len(text) - len(fields["text_position"])
        return fields | {"text_position": text}


def located(
    example: GroundedExample, seen: Decoded, counts: Counter[str]
) -> tuple[GroundedExample, dict[int, Turn]]:
    """The answers of an example in a decoded sequence.

    Messages come in their order, each once. Of the places where an answer may be, before the next
    question, the first whose tokens have labels is taken, or else the first.

    Args:
        example: with texts as the program rendered them.
        seen: its sequence.
        counts: adds to `answers_unfound`, `regions_unfound`.

    Returns:
        The example, its texts in the form in which the tokenizer kept them, answers without labels
        as context, and without regions and phrases of answers that were not found; and the turns.
    """
    for form in FORMS:
        normal = partial(unicodedata.normalize, form) if form else str
        turns, trained = _searched(example, seen, normal)
        if len(turns) == sum(message["role"] == "assistant" for message in example.messages):
            return _changed(example, turns, trained, normal), turns
    turns, trained = _searched(example, seen, str)
    answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    counts["answers_unfound"] += len(answers) - len(turns)
    counts["regions_unfound"] += sum(region.turn not in turns for region in example.regions)
    kept: dict[str, Any] = {
        name: tuple(each for each in getattr(example, name) if each.turn in turns)
        for name in ("regions", "phrases")
    }
    return _changed(replace(example, **kept), turns, trained, str), turns


def _searched(
    example: GroundedExample, seen: Decoded, normal: Callable[[str], str]
) -> tuple[dict[int, Turn], set[int]]:
    """(turns that were found, those of them that are trained), by the message's index."""
    turns, trained, at = {}, set(), 0
    texts = [normal(message_text(message)) for message in example.messages]
    for index, message in enumerate(example.messages):
        core = texts[index].strip()
        if message["role"] != "assistant":
            core = core.rpartition(">")[2].strip()  # behind placeholders of images
            places = seen.occurrences(core, at, len(seen.text)) if core else []
            at = places[0].at + len(core) if places else at
            continue
        if not core:
            turns[index] = Turn((Piece(0, 0, at),), (at, at))
            continue
        following = texts[index + 1].rpartition(">")[2].strip() if index + 1 < len(texts) else ""
        bounds = seen.occurrences(following, at, len(seen.text)) if following else []
        found: list[Found] = []
        for bound in [*(each.at for each in bounds), len(seen.text)]:
            found = found or seen.occurrences(core, at, bound)
        if not found:
            continue
        place = next((each for each in found if each.trained), found[0])
        lead = len(texts[index]) - len(texts[index].lstrip())
        at = place.at + len(core)
        turns[index] = Turn((Piece(lead, lead + len(core), place.at),), (at, at))
        if place.trained:
            trained.add(index)
    return turns, trained


def _changed(
    example: GroundedExample,
    turns: dict[int, Turn],
    trained: set[int],
    normal: Callable[[str], str],
) -> GroundedExample:
    """The example with texts in another form, spans moved alike, and which answers are trained."""

    def moved(span: Any) -> Any:
        text = message_text(example.messages[span.turn])
        start, stop = (len(normal(text[:at])) for at in (span.start, span.stop))
        return replace(span, start=start, stop=stop)

    messages = [
        {
            "role": message["role"],
            "content": normal(message_text(message)),
            **({"train": index in trained} if message["role"] == "assistant" else {}),
        }
        for index, message in enumerate(example.messages)
    ]
    spans: dict[str, Any] = {
        n: tuple(map(moved, getattr(example, n))) for n in ("regions", "phrases")
    }
    return replace(example, messages=messages, **spans)
