"""Noun phrases by spaCy, or by a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.chat import ChatSettings, ask
from groundkern.trainer.prepare.phrases.rules import NounPhrase, is_date

SPACY_MODEL = "en_core_web_sm"
_QUANTITY = re.compile(r"(?:an? |the )?(?:lot|lots|couple|number|bunch|dozens|plenty)", re.I)
_PLACES = {"front", "top", "order", "addition", "example", "least", "most", "between"}
_RULES = """\
List the base noun phrases of a text: from the determiner to the head noun, without the prepositions
and clauses after it ("a man" and "a black hat" in "a man in a black hat"). Leave out pronouns, bare
numbers and dates. The subject of a phrase is its head noun, one word. Copy the text exactly, in its
order. Reply with JSON and nothing else: {"phrases": [{"text": "a man", "subject": "man"}]}"""


class BadPhrases(ValueError):
    """A reply that is not a list of phrases of the text; says what was wanted and what came."""


def spacy_phrases(text: str, model: str = SPACY_MODEL) -> list[NounPhrase]:
    """spaCy's noun chunks, less pronouns, bare numbers and words of places ("in front of").

    "A lot of", "a couple of" and their like are joined with the noun they count, as in `rules`.

    Raises:
        ConfigError: spaCy or the model is not installed.
    """
    found: list[NounPhrase] = []
    nlp = spacy_model(model)
    try:
        chunks = list(nlp(text).noun_chunks)
    except (NotImplementedError, ValueError) as error:  # E894; no parse for this text
        why = " ".join(str(error).split())
        wanted = f"noun chunks of {model!r}, a pipeline for {nlp.lang!r}"
        raise BadPhrases(f"expected {wanted}, got an error ({why})") from None
    for chunk in chunks:
        head = chunk.root
        place = len(chunk) == 1 and chunk.text.lower() in _PLACES
        number = head.pos_ == "NUM" and not re.search(r"[%$\u20ac\u00a3\u00a5]", chunk.text)
        if head.pos_ == "PRON" or place or number or is_date(chunk.text):
            continue
        start = chunk.start_char
        joined = found and re.fullmatch(r"\s+of\s+", text[found[-1].stop : start])
        if joined and _QUANTITY.fullmatch(text[found[-1].start : found[-1].stop]):
            start = found.pop().start
        found.append(NounPhrase(start, chunk.end_char, (head.idx, head.idx + len(head))))
    return found


@cache
def spacy_model(name: str) -> Any:
    """The pipeline, loaded once per process."""
    try:
        import spacy
    except ImportError:
        raise ConfigError("--by spacy: needs the package spacy (pip install spacy)") from None
    try:
        nlp = spacy.load(name, exclude=["ner", "lemmatizer"])
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"--spacy-model: expected an installed model, got {name!r} ({why})"
        ) from None
    if "parser" not in nlp.pipe_names:
        raise ConfigError(f"--spacy-model: expected one with a parser, got {name!r}, without")
    return nlp


def has_spacy(model: str) -> bool:
    """Whether spaCy and the model are installed."""
    try:
        spacy_model(model)
    except ConfigError:
        return False
    return True


def model_phrases(text: str, chat: ChatSettings, attempts: int = 2) -> list[NounPhrase]:
    """What the model lists, checked against the text.

    Raises:
        BadPhrases: no valid reply in all attempts.
        trainer.prepare.chat.RefusedRequest: the endpoint cannot answer for this text.
    """
    messages = [{"role": "system", "content": _RULES}, {"role": "user", "content": text}]
    for attempt in range(attempts):
        reply = ask(chat, messages)
        try:
            return parse_phrases(reply, text)
        except BadPhrases as error:
            if attempt + 1 == attempts:
                raise
            messages = messages + [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": f"That does not fit: {error}. Reply again."},
            ]
    return []


def parse_phrases(reply: str, text: str) -> list[NounPhrase]:
    """The phrases of a reply, each found in `text` after the one before it.

    Raises:
        BadPhrases: not the JSON asked for, a phrase that is not there or out of order, a subject
            that is not a word of its phrase.
    """
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", reply, re.DOTALL)
    try:
        entries = json.loads(fenced[1] if fenced else reply)["phrases"]
        pairs = [(entry["text"], entry["subject"]) for entry in entries]
        if not all(isinstance(each, str) and each.strip() for pair in pairs for each in pair):
            raise TypeError
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        wanted = '{"phrases": [{"text": ..., "subject": ...}, ...]}'
        raise BadPhrases(f"expected {wanted}, got {reply[:60]!r}") from None
    found, at = [], 0
    for words, subject in pairs:
        start = _as_words(words, text, at, len(text))
        if start < 0:
            raise BadPhrases(f"expected phrases of the text in its order, got {words[:60]!r}")
        at = start + len(words)
        head = _as_words(subject, text, start, at, last=True)
        if head < 0:
            raise BadPhrases(f"expected a word of {words[:60]!r} as subject, got {subject[:60]!r}")
        found.append(NounPhrase(start, at, (head, head + len(subject))))
    return found


def _as_words(words: str, text: str, start: int, stop: int, *, last: bool = False) -> int:
    """Position of `words` between `start` and `stop`, not within a longer word; -1: not there."""
    pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
    starts = [match.start() for match in re.compile(pattern).finditer(text, start, stop)]
    return starts[-1 if last else 0] if starts else -1
