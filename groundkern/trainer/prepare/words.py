"""`prepare words`: words read by OCR and the visual tokens they label (DV-SFT, image-to-label).

The filters and the bottom-right rule of DV-SFT's paper. The rules that need the model's patches and
tokens are those of training, `groundkern.hf.data.words`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundkern.trainer.prepare.arguments import (
    add_choice,
    add_common,
    add_pages,
    add_reading,
    add_samples,
    named,
    positive,
)
from groundkern.trainer.prepare.shards import own_output

if TYPE_CHECKING:
    from groundkern.trainer.prepare.ocr.cache import Readings
    from groundkern.trainer.prepare.output import Output
    from groundkern.trainer.prepare.pipeline import Made
    from groundkern.trainer.prepare.sources import Item

HELP = "read the words of images by OCR and label the visual tokens they end on (DV-SFT)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare words`."""
    add_samples(parser, "samples (JSON lines), a folder of images and PDFs, or one of these")
    parser.add_argument(
        "--model",
        type=Path,
        help="model folder: keeps only words that label a visual token of its processor",
    )
    reading = add_reading(parser, "reading", min_confidence=0.5)
    reading.add_argument(
        "--min-kept",
        type=float,
        default=0.4,
        help="reject an image of whose words a smaller share is sure and more than a letter",
    )
    rules = parser.add_argument_group("labelling, with --model")
    rules.add_argument(
        "--max-label-tokens", type=positive(int), default=3, help="drop words of more tokens"
    )
    rules.add_argument(
        "--max-word-patches",
        type=positive(float),
        default=3.0,
        help="drop words taller, in visual tokens",
    )
    add_choice(
        rules,
        "--on-shared-token",
        ("drop", "last", "largest", "several"),
        "which of two words on one visual token stays; both with `several`",
    )
    rules.add_argument(
        "--max-number-tokens", type=positive(int), default=12, help="drop numbers of more tokens"
    )
    add_choice(
        rules,
        "--number-label",
        ("several", "first", "last", "drop"),
        "which tokens of a number are its label; `drop`: numbers label nothing",
    )
    add_choice(
        rules,
        "--word-label",
        ("first", "several", "last"),
        "which tokens of another word are its label; with `several` the limit is that of numbers",
    )
    rules.add_argument(
        "--keep-punctuation",
        dest="strip_punctuation",
        action="store_false",
        help="tokenise words with the punctuation around them",
    )
    rules.add_argument(
        "--no-leading-space",
        dest="leading_space",
        action="store_false",
        help="tokenise words without a space before them",
    )
    parser.add_argument("--replace", action="store_true", help="read samples that have words too")
    parser.add_argument(
        "--question", default="Read the text.", help="asked of each image of a folder"
    )
    add_pages(parser)
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Reads, labels, writes, and prints the statistics."""
    from groundkern.trainer.prepare.documents import OnPages
    from groundkern.trainer.prepare.listing import find_pictures, holds_pictures
    from groundkern.trainer.prepare.ocr.cache import Readings
    from groundkern.trainer.prepare.ocr.settings import OcrSettings
    from groundkern.trainer.prepare.running import run_work
    from groundkern.trainer.prepare.sources import open_source

    pictures = None
    if holds_pictures(arguments.input):
        pictures = find_pictures(arguments.input, **named(arguments, "output", "root", "pages"))
        source, root, unit = pictures.source, pictures.root, "image"
    else:
        source, unit = open_source(arguments.input), "sample"
        root = arguments.root or arguments.input.parent
    readings = Readings.beside(own_output(arguments), OcrSettings.of(arguments))
    rules = None
    if arguments.model is not None:
        from groundkern.trainer.prepare.grid import visual_grid

        visual_grid(arguments.model)
        options = [field.name for field in fields(Rules) if field.name != "model"]
        rules = Rules(arguments.model, **named(arguments, *options))
    options = ("min_confidence", "min_kept", "replace", "question")
    work = ReadWords(root, readings, rules, **named(arguments, *options))
    out = run_work(arguments, source, OnPages(work, root, arguments.dpi), root=root, unit=unit)
    for line in [*(pictures.passed_over.told() if pictures else ()), *statistics(out)]:
        print(line)
    return 0


@dataclass(frozen=True)
class Rules:
    """Which words label a visual token: a model folder, and the arguments of `WordEncoder` and
    `WordLabeler`."""

    model: Path
    leading_space: bool = True
    strip_punctuation: bool = True
    number_label: str = "several"
    word_label: str = "first"
    max_label_tokens: int = 3
    max_number_tokens: int = 12
    max_word_patches: float = 3.0
    on_shared_token: str = "drop"


@dataclass(frozen=True)
class ReadWords:
    """Adds `words` to a sample, or makes a sample of an image path; see `add_arguments`."""

    root: Path
    readings: Readings
    rules: Rules | None = None
    question: str = "Read the text."
    replace: bool = False
    min_confidence: float = 0.5
    min_kept: float = 0.4

    def __call__(self, item: Item) -> Made:
        from groundkern.trainer.data.images import confined, image_size
        from groundkern.trainer.data.sample import parse_sample
        from groundkern.trainer.prepare.ocr.scripts import joined_text
        from groundkern.trainer.prepare.pipeline import LeftOut, Made
        from groundkern.trainer.records import chat_sample

        counts: Counter[str] = Counter()
        if isinstance(item.value, str):
            path = confined(item.value, self.root, where=item.where, field="image")
            paths, sizes = [path], [image_size(path, where=item.where, field="image")]
            words = self._read(item, paths, sizes, counts)
            if not words:
                raise LeftOut(f"{item.where}: expected words to answer with, got none")
            text = joined_text(word["text"] for word in words)
            record = chat_sample([item.value], self.question, text)
        else:
            sample = parse_sample(item.value, root=self.root, where=item.where)
            if not sample.images:
                return Made([item.value], counts={"samples_without_images": 1})
            record, paths, sizes = item.value, list(sample.images), list(sample.sizes)
            if sample.words and not self.replace:
                return Made([record], counts={"samples_with_words_before": 1})
            words = self._read(item, paths, sizes, counts)
        words = self._labelled(item, words, sizes, counts)
        counts["samples_read"] += 1
        return Made([{**record, "words": words}], counts=counts)

    def _read(self, item: Item, paths: list[Path], sizes: list, counts: Counter) -> list[dict]:
        """Word records of all images, in reading order."""
        from groundkern.trainer.data.images import wrong
        from groundkern.trainer.prepare.ocr.quality import complaint
        from groundkern.trainer.prepare.ocr.reading import readings_of
        from groundkern.trainer.prepare.ocr.rotation import common_turn
        from groundkern.trainer.prepare.pipeline import LeftOut

        found = []
        for index, (path, size) in enumerate(zip(paths, sizes)):
            place = {"where": item.where, "field": f"images[{index}]"}
            words, before = readings_of(path, size, self.readings, **place)
            counts["images_read_before" if before else "images_read"] += 1
            counts["images_turned"] += not before and common_turn(words) != 0
            options = {"min_confidence": self.min_confidence, "min_kept": self.min_kept}
            if bad := complaint(words, **options):
                raise LeftOut(str(wrong(**place, wanted="a page of words", got=bad)))
            counts["words_read"] += len(words)
            sure = [word for word in words if word.confidence >= self.min_confidence]
            counts["words_unsure"] += len(words) - len(sure)
            several = {"image": index} if len(paths) > 1 else {}
            found += [{"text": word.text, "box": list(word.box), **several} for word in sure]
        return found

    def _labelled(self, item: Item, words: list[dict], sizes: list, counts: Counter) -> list[dict]:
        """The words that label a visual token; all of them without a model."""
        if self.rules is None:
            counts["words_written"] += len(words)
            return words
        from groundkern.hf.data.example import Word
        from groundkern.trainer.data.images import SampleError
        from groundkern.trainer.prepare.grid import visual_grid

        placed = []
        for word in words:
            image = word.get("image", 0)
            width, height = sizes[image]
            x0, y0, x1, y1 = word["box"]
            box = (x0 / width, y0 / height, x1 / width, y1 / height)
            placed.append(Word(word["text"], box, image))
        try:
            table = visual_grid(self.rules.model).table(*sizes)
        except ValueError as error:
            raise SampleError(f"{item.where}: expected images the model takes ({error})") from None
        labels = _labeler(self.rules).place(placed, table, counts)
        counts["visual_tokens"] += len(table)
        written = sorted(index for label in labels for index in label.words)
        counts["words_written"] += len(written)
        counts["distinct_labels"] += len({(label.image, label.labels) for label in labels})
        return [words[index] for index in written]


@cache
def _labeler(rules: Rules) -> Any:
    from groundkern.hf.data.labels import WordEncoder
    from groundkern.hf.data.words import WordLabeler
    from groundkern.trainer.prepare.grid import visual_grid

    return WordLabeler(
        WordEncoder(
            visual_grid(rules.model).processor.tokenizer,
            leading_space=rules.leading_space,
            strip_punctuation=rules.strip_punctuation,
            number_label=rules.number_label,
            word_label=rules.word_label,
        ),
        rules.max_label_tokens,
        rules.max_number_tokens,
        rules.max_word_patches,
        rules.on_shared_token,
    )


IMAGES = {
    "images_read": "images read",
    "images_read_before": "images of samples that share a reading made before",
    "images_turned": "images lie on a side or on their head; their words were read upright",
}
LOSSES = {
    "words_unsure": "below --min-confidence",
    "words_dropped_blank": "without a token",
    "words_dropped_punctuation": "without a letter or digit",
    "words_dropped_special": "that are a special token",
    "words_dropped_unknown": "that the tokenizer does not know",
    "words_dropped_fragment": "that begin with a part of a character",
    "words_dropped_number": "that are numbers",
    "words_dropped_long": "of too many tokens",
    "words_dropped_tall": "too tall",
    "words_shared_token": "on a visual token with another",
    "words_dropped_outside": "on no visual token",
}


def statistics(out: Output) -> list[str]:
    """The figures of the paper's Table 1 (labels, visual tokens, coverage) and what was dropped."""
    counts, samples = out.counts, out.counts["samples_read"]
    told = []
    if before := counts["samples_with_words_before"]:
        told.append(f"{before:,} samples had words already and are as they were (--replace)")
    if without := counts["samples_without_images"]:
        told.append(f"{without:,} samples have no image and are as they were")
    if not samples:
        return told
    told += [f"{counts[name]:,} {what}" for name, what in IMAGES.items() if counts[name]]
    lost = ", ".join(f"{counts[name]:,} {why}" for name, why in LOSSES.items() if counts[name])
    written = counts["words_written"]
    told.append(
        f"words: {counts['words_read']:,} read, {written:,} written"
        + (f"; dropped {lost}" if lost else "")
    )
    tokens = counts["visual_tokens"]
    if tokens:
        told.append(
            f"a sample has {written / samples:.1f} labelled of {tokens / samples:.1f} visual "
            f"tokens (coverage {written / tokens:.1%}), "
            f"{counts['distinct_labels'] / samples:.1f} distinct"
        )
    else:
        told.append(
            f"a sample has {written / samples:.1f} words (--model MODEL counts visual tokens)"
        )
    return told
