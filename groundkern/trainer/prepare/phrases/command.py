"""`prepare phrases`: noun phrases of answers, their subjects, and composites (HIST).

Source: (H1)-(H3) of docs/methods/hist.md; docs/data/prepare-marks.md has the rules.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundkern.trainer.prepare.arguments import add_choice, add_common, add_samples
from groundkern.trainer.prepare.chat import add_chat_arguments

if TYPE_CHECKING:
    from groundkern.trainer.prepare.chat import ChatSettings
    from groundkern.trainer.prepare.pipeline import Made
    from groundkern.trainer.prepare.sources import Item

HELP = "list the phrases of answers, their subjects and composites (HIST)"
TITLES = {
    "samples_with_phrases": "samples with phrases",
    "samples_without_phrases": "samples in whose answers none were found",
    "samples_with_phrases_before": "samples left as they were: they have phrases",
    "phrases": "phrases",
    "composites": "composites",
}
REFUSED = "answers_not_read_"  # starts the counts of answers in a script that is not read
FOREIGN = "answers_in_"  # and those of answers that look like another language than English


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare phrases`."""
    add_samples(parser)
    add_finder(parser)
    parser.add_argument("--replace", action="store_true", help="samples that have phrases too")
    add_chat_arguments(parser)
    add_common(parser)


def add_finder(parser: argparse.ArgumentParser) -> None:
    """Adds how phrases are found."""
    add_choice(
        parser,
        "--by",
        ("auto", "rules", "spacy", "model"),
        "auto: spaCy if it is installed with the model, else rules",
    )
    parser.add_argument("--spacy-model", default="en_core_web_sm", help="spaCy pipeline by name")


def run(arguments: argparse.Namespace) -> int:
    """Finds, writes, and prints the counts."""
    from groundkern.trainer.prepare.chat import chat_settings
    from groundkern.trainer.prepare.running import run_asking
    from groundkern.trainer.prepare.sources import open_source

    source = open_source(arguments.input)
    root = arguments.root or arguments.input.parent
    arguments.by = chosen(arguments.by, arguments.spacy_model)
    chat = chat_settings(arguments) if arguments.by == "model" else None
    finder = Finder(arguments.by, arguments.spacy_model, chat, arguments.attempts)
    work = ListPhrases(root, finder, arguments.replace)
    print(f"Phrases by {arguments.by}")
    return run_asking(arguments, source, work, root=root, chat=chat, titles=titles(finder))


def titles(finder: Finder) -> dict[str, str]:
    """What the counts are called, those of languages included."""
    from groundkern.trainer.prepare.phrases.language import LANGUAGES, OTHER, SCRIPTS

    told = dict(TITLES)
    for name in (*SCRIPTS, OTHER):
        told[REFUSED + name] = f"answers left without phrases: {finder.refusal(name)}"
    for name in LANGUAGES:
        told[FOREIGN + name] = f"answers that look {name}: {finder.by} knows English"
    return told


def chosen(by: str, model: str) -> str:
    """ "auto" as what it means here.

    Raises:
        ConfigError: "spacy", but it or its model is not installed.
    """
    from groundkern.trainer.prepare.phrases.others import has_spacy, spacy_model

    if by == "spacy":
        spacy_model(model)
    return by if by != "auto" else "spacy" if has_spacy(model) else "rules"


@dataclass(frozen=True)
class Finder:
    """A text and its turn to canonical phrase records."""

    by: str
    spacy_model: str = "en_core_web_sm"
    chat: ChatSettings | None = None
    attempts: int = 2

    def unread(self, text: str) -> str | None:
        """The script of a text that this finder does not know, such as "Japanese"; else None."""
        from groundkern.trainer.prepare.phrases.language import reads, script_of
        from groundkern.trainer.prepare.phrases.others import spacy_model

        if self.by == "model":
            return None
        script = script_of(text)
        known = "en" if self.by == "rules" else spacy_model(self.spacy_model).lang
        return None if reads(known, script) else script or "Latin"

    def refusal(self, script: str) -> str:
        """Why texts of a script get no phrases, and what would give them some."""
        knows = "English" if self.by == "rules" else f"what {self.spacy_model} was made for"
        return (
            f"`{self.by}` knows {knows}, these are {script} "
            "(--by spacy with a --spacy-model for it, or --by model)"
        )

    def __call__(self, text: str, turn: int | None = None) -> list[dict[str, Any]]:
        from groundkern.trainer.prepare.phrases.composites import records
        from groundkern.trainer.prepare.phrases.others import model_phrases, spacy_phrases
        from groundkern.trainer.prepare.phrases.rules import noun_phrases

        match self.by:
            case "rules":
                return records(text, noun_phrases(text), turn)
            case "spacy":
                return records(text, spacy_phrases(text, self.spacy_model), turn)
        return records(text, model_phrases(text, self.chat, self.attempts), turn)


@dataclass(frozen=True)
class ListPhrases:
    """Adds `phrases` to a sample; see `add_arguments`."""

    root: Path
    finder: Finder
    replace: bool = False

    def __call__(self, item: Item) -> Made:
        from groundkern.hf.data.example import message_text
        from groundkern.trainer.data.images import SampleError
        from groundkern.trainer.data.sample import parse_sample
        from groundkern.trainer.prepare.chat import RefusedRequest
        from groundkern.trainer.prepare.phrases.language import language_of
        from groundkern.trainer.prepare.phrases.others import BadPhrases
        from groundkern.trainer.prepare.pipeline import Made

        sample = parse_sample(item.value, root=self.root, where=item.where)
        if sample.phrases and not self.replace:
            return Made([item.value], counts={"samples_with_phrases_before": 1})
        turns = [i for i, m in enumerate(sample.messages) if m["role"] == "assistant"]
        phrases = []
        counts: Counter[str] = Counter()
        for turn in turns:
            text = message_text(sample.messages[turn])
            if script := self.finder.unread(text):
                counts[REFUSED + script] += 1
                continue
            if self.finder.by == "rules" and (language := language_of(text)):
                counts[FOREIGN + language] += 1
            try:
                phrases += self.finder(text, turn if len(turns) > 1 else None)
            except (BadPhrases, RefusedRequest) as error:
                raise SampleError(f"{item.where}: `messages[{turn}]`: {error}") from None
        composite = sum("subject" not in phrase for phrase in phrases)
        counts.update(phrases=len(phrases) - composite, composites=composite)
        counts["samples_with_phrases" if phrases else "samples_without_phrases"] += 1
        return Made([{**item.value, "phrases": phrases}], counts=counts)
