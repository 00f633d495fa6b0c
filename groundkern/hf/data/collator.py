"""`GroundingCollator`: grounded examples in, one padded batch with labels and `gk_` rows out.

The rows of the different losses are found by `layout` (text, SMAM, KLAL) and `words` (DV-SFT);
this file calls the processor once for the whole batch and pads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from groundkern.checks import fail, require
from groundkern.hf.data.concepts import LensRows, PhraseRows, lens_rows, phrase_rows
from groundkern.hf.data.example import GroundedExample
from groundkern.hf.data.geometry import image_geometry
from groundkern.hf.data.layout import (
    EMPTY_REGION,
    MAP_ROWS,
    Layout,
    MapRows,
    SideRows,
    kept_tokens,
    map_rows,
    region_masks,
    side_rows,
    trained_positions,
)
from groundkern.hf.data.spans import Chat, TokenSpans, find_expansions, render_chat
from groundkern.hf.data.words import WordLabel, WordLabeler

LABEL_BAGS = ("distinct", "multiset")

# what the processor returns per token, and the value that pads it (None: the tokenizer's)
_PER_TOKEN = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}


@dataclass
class _Sample:
    """All rows of one sequence, positions counted without padding."""

    layout: Layout
    trained: list[int]
    sides: SideRows
    words: list[WordLabel]
    maps: MapRows
    phrases: PhraseRows
    lens: LensRows


class GroundingCollator:
    """Turns `GroundedExample`s into the batch that an attached model takes.

    The batch holds what the processor returns, `labels` (not shifted, -100: not trained; every
    assistant text and the special token that ends its turn are) and the rows of every loss as `gk_`
    tensors. They are integers or bool, padded with -1 (bool: False), and always all there; a width
    is 0 where a batch has none. B sequences, S tokens:

    - `gk_image` [B, S] int32: which image of its sample a visual token belongs to.
    - `gk_text_position` [B, Rt] int32: rows that predict a trained token (the token before it).
    - `gk_side_position`, `gk_side_set` [B, Rs] int32: SMAM's rows and which set of `gk_side_inside`
      [B, G, S] bool holds the visual tokens of their regions.
    - `gk_word_position` [B, Rw] int32, `gk_word_label` [B, Rw] int64: DV-SFT's visual tokens and
      their labels; `gk_word_bag` [B, I, Y] int64: the distinct labels of each image.
    - `gk_map_position`, `gk_map_image` [B, Rm] int32, `gk_map_target` [B, Rm, C] int32 (fixed
      point, of `groundkern.maps.dequantise`): KLAL's rows, their image and target over
      `gk_map_columns` [B, C] int32, all visual tokens of the sequence.
    - `gk_phrase_position`, `gk_phrase_number`, `gk_phrase_subject` [B, Rp] int32: HIST's rows,
      which predict a token of a phrase, the phrase's number, and 1 on its subject;
      `gk_phrase_composite` [B, K, 3] int32: the numbers of a composite and its two parts.
    - `gk_lens_position`, `gk_lens_inside` [B, Rl] int32, `gk_lens_label` [B, Rl] int64: with
      `lens`, visual tokens on (1) and off (0) a concept's object, and its token.

    `counts` (a Counter) adds up what was found and what was lost: `samples`, `samples_truncated`,
    `tokens_truncated`, `text_rows`; `regions`, `regions_truncated` (some of its text was cut),
    `regions_outside` (on no visual token); `side_rows`, `side_rows_without_region`,
    `side_rows_on_image` (the row would be an image token); `map_rows`, `map_rows_truncated`,
    `map_rows_without_target`; `phrases`, `phrases_truncated`, `phrase_rows`, `subject_rows`,
    `composites`; `lens_rows`, `lens_rows_inside`; `words`, `word_rows`, `words_dropped_blank`,
    `words_dropped_long`, `words_dropped_tall`, `words_dropped_outside`, `words_shared_token`. A
    worker process of a DataLoader counts for itself.

    Args:
        processor: the model's processor, with a fast tokenizer, a chat template and a pad token.
        config: the model's config.
        max_length: tokens per sequence at most; text is cut from the end, images never are.
        leading_space, max_label_tokens, max_word_patches, on_shared_token: see `WordLabeler`.
        label_bag: an image's labels are its "distinct" ones, or the "multiset" of all of them.
        map_kind, map_levels: see `groundkern.maps.target_map`.
        map_rows: "last", "predictor", "answer" or "phrase" (`layout.map_rows`).
        empty_region: an aligned token whose regions hold no visual token is left out ("skip") or
            sees "language" tokens alone.
        lens: make the rows of the logit-lens loss; concepts are the texts of regions.
        lens_outside: visual tokens off an object for each on it; None: all.

    Raises:
        ValueError: the message names the example.

    Source: METHODS.md sections 1 to 3.
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
        map_kind: str = "neighbours",
        label_bag: str = "distinct",
        map_levels: tuple[float, float, float] = (1.0, 0.5, 1e-3),
        map_rows: str = "last",
        empty_region: str = "skip",
        lens: bool = False,
        lens_outside: float | None = 1.0,
    ) -> None:
        tokenizer = processor.tokenizer
        require(
            tokenizer.is_fast,
            "processor.tokenizer",
            "a fast tokenizer, for its offsets",
            "a slow one",
        )
        require(tokenizer.pad_token_id is not None, "processor.tokenizer", "a pad token", None)
        require(
            max_length is None or max_length > 0,
            "max_length",
            "a positive number or None",
            max_length,
        )
        for name, value, known in (
            ("label_bag", label_bag, LABEL_BAGS),
            ("map_rows", map_rows, MAP_ROWS),
            ("empty_region", empty_region, EMPTY_REGION),
        ):
            require(value in known, name, " or ".join(map(repr, known)), repr(value))
        self.processor = processor
        self.config = config
        self.max_length = max_length
        self.map_kind = map_kind
        self.map_levels = map_levels
        self.map_rows, self.empty_region, self.label_bag = map_rows, empty_region, label_bag
        self.lens, self.lens_outside = lens, lens_outside
        self.counts: Counter[str] = Counter()
        self._labeler = WordLabeler(
            tokenizer, leading_space, max_label_tokens, max_word_patches, on_shared_token
        )
        self._special = frozenset(
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        )

    def __call__(self, examples: Sequence[GroundedExample]) -> dict[str, Tensor]:
        require(len(examples) > 0, "examples", "at least one", "none")
        for example in examples:
            example.check()
        chats = [
            render_chat(self.processor, example.chat(), _name(example)) for example in examples
        ]
        features = self._process(examples, [chat.text for chat in chats])
        offsets = features.pop("offset_mapping")
        replaced = features.pop("text_replacement_offsets", None) or [None] * len(examples)
        tables = image_geometry(
            self.processor, self.config, [example.images for example in examples], features
        )
        per_token = {key: features.pop(key) for key in _PER_TOKEN if key in features}
        samples = []
        for b, (example, chat, table) in enumerate(zip(examples, chats, tables)):
            ids = per_token["input_ids"][b]
            tokens = [int((table[:, 0] == image).sum()) for image in range(len(example.images))]
            placeholder = self.processor.image_token
            expansions = find_expansions(chat.text, placeholder, tokens, replaced[b])
            spans = TokenSpans(offsets[b], expansions)
            samples.append(self._sample(example, chat, spans, ids, table))
        batch = dict(BatchFeature(dict(features)).convert_to_tensors("pt"))
        return {**self._padded(per_token, samples), **batch, **self._rows(samples)}

    def _process(self, examples: Sequence[GroundedExample], texts: list[str]) -> dict[str, Any]:
        """One call of the processor: lists per token, arrays per image."""
        for example, text in zip(examples, texts):
            found, wanted = text.count(self.processor.image_token), len(example.images)
            what = (
                f"{wanted} times {self.processor.image_token!r} in the rendered chat, one per image"
            )
            require(found == wanted, f"{_name(example)}: messages", what, found)
        bos = self.processor.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}

        def run(examples: Sequence[GroundedExample], texts: list[str]) -> dict[str, Any]:
            images = [list(example.images) for example in examples]
            return self.processor(
                images=images if any(images) else None,
                text=texts,
                padding=False,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **options,
            ).data

        try:
            return run(examples, texts)
        except ValueError:  # such as an image too narrow for its family: find out whose
            for example, text in zip(examples, texts):
                try:
                    run([example], [text])
                except ValueError as error:
                    fail(_name(example), "a sample that the processor takes", f"its error: {error}")
            raise

    def _sample(
        self, example: GroundedExample, chat: Chat, spans: TokenSpans, ids: list[int], table: Tensor
    ) -> _Sample:
        name, image_token = _name(example), self.config.image_token_id
        vocabulary = self.config.get_text_config().vocab_size
        known = f"token ids below the model's vocabulary of {vocabulary}"
        require(max(ids) < vocabulary, f"{name}: messages", known, max(ids))
        kept = kept_tokens(ids, spans.images, self._special, self.max_length, name)
        ids_kept = [ids[i] for i in kept]
        visual = torch.tensor(
            [i for i, token in enumerate(ids_kept) if token == image_token]
        ).long()
        if len(visual) != len(table):
            fail(
                f"{name}: images",
                f"{len(table)} visual tokens by the processor's settings",
                len(visual),
            )
        layout = Layout(example, chat, spans, kept, ids_kept, self._special, visual, table)
        counts = self.counts
        counts["samples"] += 1
        counts["samples_truncated"] += len(kept) < len(ids)
        counts["tokens_truncated"] += len(ids) - len(kept)
        trained = [p for p in trained_positions(layout) if p > 0]
        counts["text_rows"] += len(trained)
        masks = region_masks(layout, counts)
        sides = side_rows(layout, masks, counts, self.empty_region)
        words = self._labeler.place(example.words, table, counts)
        for word in words:
            require(word.label < vocabulary, f"{name}: words", known, word.label)
        mapped = map_rows(layout, self.map_kind, self.map_levels, counts, self.map_rows)
        phrases, lens = phrase_rows(layout, counts), LensRows()
        if self.lens:
            label_of = self._labeler.first_token
            lens = lens_rows(layout, masks, label_of, self.lens_outside, counts)
        return _Sample(layout, trained, sides, words, mapped, phrases, lens)

    def _padded(self, per_token: dict[str, list], samples: list[_Sample]) -> dict[str, Tensor]:
        """input_ids and what runs along with it, and labels: int64 [B, S]."""
        batch = {}
        for key, values in per_token.items():
            fill = _PER_TOKEN[key]
            fill = self.processor.tokenizer.pad_token_id if fill is None else fill
            kept = [[row[i] for i in s.layout.kept] for row, s in zip(values, samples)]
            batch[key] = self._along(kept, fill)
        labels = []
        for s in samples:
            row = [-100] * len(s.layout.ids)
            for p in s.trained:
                row[p] = s.layout.ids[p]
            labels.append(row)
        batch["labels"] = self._along(labels, -100)
        return batch

    def _rows(self, samples: list[_Sample]) -> dict[str, Tensor]:
        """The `gk_` tensors."""
        width = max(len(s.layout.ids) for s in samples)
        left = self.processor.tokenizer.padding_side == "left"
        # where each sequence begins
        first = [width - len(s.layout.ids) if left else 0 for s in samples]

        def positions(rows: Callable[[_Sample], Iterable[int]]) -> Tensor:
            return _pad([[p + shift for p in rows(s)] for s, shift in zip(samples, first)])

        images = [torch.full((width,), -1) for _ in samples]
        inside = []
        for s, shift, image in zip(samples, first, images):
            columns = s.layout.visual + shift
            image[columns] = s.layout.table[:, 0].long()
            sets = torch.zeros(len(s.sides.inside), width, dtype=torch.bool)
            for row, mask in zip(sets, s.sides.inside):
                row[columns] = mask
            inside.append(sets)
        return {
            "gk_image": torch.stack(images).int(),
            "gk_text_position": positions(lambda s: [p - 1 for p in s.trained]),
            "gk_side_position": positions(lambda s: s.sides.position),
            "gk_side_set": _pad([s.sides.set for s in samples]),
            "gk_side_inside": _pad_planes(inside, width, False, torch.bool),
            "gk_word_position": positions(
                lambda s: s.layout.visual[[w.token for w in s.words]].tolist()
            ),
            "gk_word_label": _pad([[w.label for w in s.words] for s in samples], torch.int64),
            "gk_word_bag": _bags(samples, distinct=self.label_bag == "distinct"),
            "gk_map_position": positions(lambda s: s.maps.position),
            "gk_map_image": _pad([s.maps.image for s in samples]),
            "gk_map_target": _pad_planes(
                [torch.stack(s.maps.target) if s.maps.target else None for s in samples],
                max(len(s.layout.visual) for s in samples),
                -1,
                torch.int32,
            ),
            "gk_map_columns": positions(lambda s: s.layout.visual.tolist()),
            "gk_phrase_position": positions(lambda s: s.phrases.position),
            "gk_phrase_number": _pad([s.phrases.number for s in samples]),
            "gk_phrase_subject": _pad([s.phrases.subject for s in samples]),
            "gk_phrase_composite": _pad_planes(
                [torch.tensor(s.phrases.composite).reshape(-1, 3) for s in samples],
                3,
                -1,
                torch.int32,
            ),
            "gk_lens_position": positions(lambda s: s.layout.visual[s.lens.token].tolist()),
            "gk_lens_label": _pad([s.lens.label for s in samples], torch.int64),
            "gk_lens_inside": _pad([s.lens.inside for s in samples]),
        }

    def _along(self, rows: list[list[int]], fill: int) -> Tensor:
        """Pad per-token values on the tokenizer's side: int64 [B, S]."""
        left = self.processor.tokenizer.padding_side == "left"
        return _pad(rows, torch.int64, fill, left)


def _name(example: GroundedExample) -> str:
    return example.name or "example"


def _pad(
    rows: list[list[int]], dtype: torch.dtype = torch.int32, fill: int = -1, left: bool = False
) -> Tensor:
    width = max(map(len, rows))
    blanks = ([fill] * (width - len(row)) for row in rows)
    padded = [blank + row if left else row + blank for row, blank in zip(rows, blanks)]
    return torch.tensor(padded, dtype=dtype).reshape(len(rows), width)


def _pad_planes(
    planes: list[Tensor | None], width: int, fill: int | bool, dtype: torch.dtype
) -> Tensor:
    """Stack [rows, columns] tensors of different sizes: [B, most rows, width]."""
    rows = max(0 if plane is None else len(plane) for plane in planes)
    out = torch.full((len(planes), rows, width), fill, dtype=dtype)
    for b, plane in enumerate(planes):
        if plane is not None:
            out[b, : plane.shape[0], : plane.shape[1]] = plane
    return out


def _bags(samples: list[_Sample], *, distinct: bool) -> Tensor:
    """The labels of each image, ascending: int64 [B, I, Y], -1 padding."""
    kind = set if distinct else list
    bags = [
        [
            sorted(kind(w.label for w in s.words if w.image == i))
            for i in range(len(s.layout.example.images))
        ]
        for s in samples
    ]
    longest = max((len(bag) for images in bags for bag in images), default=0)
    planes = [_pad([*images, [0] * longest], torch.int64)[:-1] for images in bags]
    return _pad_planes(planes, longest, -1, torch.int64)
