"""`prepare marks`: words of the answer linked to the text of the image they stand in (SMAM).

By text (`matching`) or by a model behind an OpenAI-compatible endpoint (`labeller`);
docs/data/prepare-marks.md. Everything here is in pixels, as in the file that is written: matching
compares widths with heights of letters, which fractions of a wide image would distort. The parsed
sample's fractions become pixels once, in `MarkSamples._words`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundkern.trainer.prepare.arguments import (
    add_choice,
    add_common,
    add_reading,
    add_samples,
    named,
)
from groundkern.trainer.prepare.chat import add_chat_arguments
from groundkern.trainer.prepare.shards import own_output

if TYPE_CHECKING:
    from groundkern.trainer.data.sample import Sample
    from groundkern.trainer.prepare.marks.frames import ChartReadings
    from groundkern.trainer.prepare.marks.grouping import PrintedWord
    from groundkern.trainer.prepare.marks.labeller import LabellerSettings
    from groundkern.trainer.prepare.marks.matching import Match
    from groundkern.trainer.prepare.pipeline import Made
    from groundkern.trainer.prepare.sources import Item

HELP = "link words of answers to the text in the image they speak of (SMAM)"
TITLES = {
    "samples_marked": "samples with regions",
    "samples_unmarked": "samples in whose answers nothing was found",
    "samples_with_regions_before": "samples left as they were: they have regions",
    "samples_without_images": "samples left as they were: they have no image",
    "images_read": "images read",
    "images_read_before": "images whose reading was made before, for another sample or run",
    "phrases": "phrases linked",
    "ambiguous": "of them printed in several places",
    "ambiguous_decided": "of them in one of several places, by their row or column",
    "ambiguous_dropped": "phrases dropped: in several places, and no row or column decides",
    "general_dropped": "words dropped: only a title, an axis title or a note holds them",
    "regions": "regions written",
    "marks_dropped": "marks of the model dropped: the phrase is not the text of its regions",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare marks`."""
    add_samples(parser)
    add_choice(parser, "--by", ("text", "model"), "equal text, or ask an endpoint")
    parser.add_argument("--replace", action="store_true", help="mark samples that have regions too")
    ocr = add_reading(parser, "reading, for samples without words", min_confidence=0.3)
    ocr.add_argument(
        "--keep-lines", action="store_true", help="tesseract: read with frames, axes and bars"
    )
    ocr.add_argument("--read-again", action="store_true", help="read samples that have words too")
    text = parser.add_argument_group("text")
    text.add_argument("--gap", type=float, default=0.8, help="widest space, in letter heights")
    add_choice(
        text,
        "--ambiguous",
        ("drop", "union"),
        "a text in several places, if no row or column decides: none of them, or all",
    )
    add_choice(
        text,
        "--scales",
        ("last", "keep", "drop"),
        "ticks of an axis: only if the text stands nowhere else, always, or never",
    )
    add_chat_arguments(parser)
    asked = parser.add_argument_group("asking, with --by model")
    asked.add_argument("--alpha", type=float, default=0.35, help="opacity of the masks")
    asked.add_argument("--max-side", type=int, default=1536, help="of the image sent, in pixels")
    asked.add_argument("--max-regions", type=int, default=200, help="reject samples with more")
    asked.add_argument(
        "--any-text", action="store_true", help="keep marks on regions with another text"
    )
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Marks, writes, and prints the counts."""
    from groundkern.trainer.prepare.chat import chat_settings
    from groundkern.trainer.prepare.marks.frames import ChartReadings
    from groundkern.trainer.prepare.marks.labeller import LabellerSettings
    from groundkern.trainer.prepare.ocr.settings import OcrSettings
    from groundkern.trainer.prepare.running import run_asking
    from groundkern.trainer.prepare.sources import open_source

    source = open_source(arguments.input)
    root = arguments.root or arguments.input.parent
    chat = labeller = None
    if arguments.by == "model":
        chat = chat_settings(arguments)
        asking = ("attempts", "alpha", "max_side", "max_regions", "any_text")
        labeller = LabellerSettings(chat, **named(arguments, *asking))
    ocr = OcrSettings.of(arguments)
    readings = ChartReadings(own_output(arguments), ocr, arguments.keep_lines)
    options = ("min_confidence", "read_again", "gap", "ambiguous", "scales", "replace")
    work = MarkSamples(root, readings, labeller, **named(arguments, *options))
    return run_asking(arguments, source, work, root=root, chat=chat, titles=TITLES)


@dataclass(frozen=True)
class MarkSamples:
    """Adds `regions` to a sample; see `add_arguments`."""

    root: Path
    readings: ChartReadings
    labeller: LabellerSettings | None = None
    min_confidence: float = 0.3
    gap: float = 0.8
    ambiguous: str = "drop"
    scales: str = "last"
    replace: bool = False
    read_again: bool = False

    def __call__(self, item: Item) -> Made:
        from groundkern.trainer.data.sample import parse_sample
        from groundkern.trainer.prepare.marks.matching import PrintedText
        from groundkern.trainer.prepare.pipeline import Made

        sample = parse_sample(item.value, root=self.root, where=item.where)
        if not sample.images:
            return Made([item.value], counts={"samples_without_images": 1})
        if sample.regions and not self.replace:
            return Made([item.value], counts={"samples_with_regions_before": 1})
        counts: Counter[str] = Counter()
        words = self._words(item, sample, counts)
        printed = PrintedText(words, gap=self.gap, scales=self.scales)
        regions = []
        for turn, message in enumerate(sample.messages):
            if message["role"] != "assistant":
                continue
            answer = _text(message)
            matches = self._matches(item, sample, printed, turn, answer, counts)
            counts["phrases"] += len(matches)
            counts["ambiguous"] += sum(match.ambiguous for match in matches)
            for match in matches:
                regions += _records(match, answer, turn, sample)
        counts["regions"] += len(regions)
        counts["samples_marked" if regions else "samples_unmarked"] += 1
        return Made([{**item.value, "regions": regions}], counts=counts)

    def _words(self, item: Item, sample: Sample, counts: Counter) -> list[PrintedWord]:
        """The sample's own words, or what OCR reads, in pixels."""
        from groundkern.trainer.prepare.marks.grouping import PrintedWord

        found = []
        if sample.words and not self.read_again:
            for word in sample.words:
                x0, y0, x1, y1 = word.box
                width, height = sample.sizes[word.image]
                box = (x0 * width, y0 * height, x1 * width, y1 * height)
                found.append(PrintedWord(word.text, box, word.image))
            return found
        for index, (path, size) in enumerate(zip(sample.images, sample.sizes)):
            place = {"where": item.where, "field": f"images[{index}]"}
            words, before = self.readings.words(path, size, **place)
            counts["images_read_before" if before else "images_read"] += 1
            found += [
                PrintedWord(word.text, word.box, index, word.line)
                for word in words
                if word.confidence >= self.min_confidence
            ]
        return found

    def _matches(
        self, item: Item, sample: Sample, printed: Any, turn: int, answer: str, counts: Counter
    ) -> list[Match]:
        from groundkern.trainer.data.images import SampleError, load_rgb

        if self.labeller is None:
            question = _asked(sample, turn)
            return printed.matches(answer, self.ambiguous, question=question, counts=counts)
        from groundkern.trainer.prepare.chat import RefusedRequest
        from groundkern.trainer.prepare.marks.labeller import BadMarks, label

        images = [
            load_rgb(path, size, where=item.where, field=f"images[{index}]")
            for index, (path, size) in enumerate(zip(sample.images, sample.sizes))
        ]
        question = _asked(sample, turn)
        try:
            return label(images, printed, question, answer, self.labeller, counts)
        except (BadMarks, RefusedRequest) as error:
            raise SampleError(f"{item.where}: `messages[{turn}]`: {error}") from None


def _asked(sample: Sample, turn: int) -> str:
    asked = [_text(message) for message in sample.messages[:turn] if message["role"] == "user"]
    return asked[-1] if asked else ""


def _text(message: dict[str, Any]) -> str:
    from groundkern.hf.data.example import message_text

    return message_text(message)


def _records(match: Match, answer: str, turn: int, sample: Sample) -> list[dict[str, Any]]:
    """One canonical region for each place; turn and image only if there are several."""
    from groundkern.trainer.records import span_of

    record = span_of(answer, match.start, match.stop)
    if sum(message["role"] == "assistant" for message in sample.messages) > 1:
        record["turn"] = turn
    several = len(sample.images) > 1
    return [
        {
            **record,
            **({"image": place.image} if several else {}),
            "box": [round(edge, 2) for edge in place.box],
        }
        for place in match.places
    ]
