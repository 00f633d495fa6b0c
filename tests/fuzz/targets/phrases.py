"""`prepare phrases`: by rules and from replies; records name the spans they came of."""

from __future__ import annotations

import json

from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.prepare.phrases.composites import composites, records
from groundkern.trainer.prepare.phrases.others import BadPhrases, parse_phrases
from groundkern.trainer.prepare.phrases.rules import NounPhrase, noun_phrases
from tests.fuzz.target import Target, expect


def _spans(text: str, phrases: list[NounPhrase]) -> None:
    at = 0
    for phrase in phrases:
        expect(at <= phrase.start < phrase.stop <= len(text), f"a span from {at} on", phrase)
        low, high = phrase.head
        expect(phrase.start <= low < high <= phrase.stop, "a head within its phrase", phrase)
        expect(bool(text[phrase.start : phrase.stop].strip()), "visible characters", phrase)
        at = phrase.stop


def _resolved(text: str, phrases: list[NounPhrase]) -> None:
    """Records say by text and number what spans say by position: both must be the same place."""
    made = records(text, phrases)
    wanted = [(p.start, p.stop, p.head) for p in phrases]
    wanted += [(start, stop, None) for start, stop in composites(text, phrases)]
    wanted.sort(key=lambda span: (span[0], -span[1]))
    sample = {"messages": [{"role": "assistant", "content": text}], "phrases": made}
    try:
        parsed = parse_sample(sample, root=None, where="text")
    except SampleError as error:
        unfit = any(part in text for part in ("<", "\ud800")) or any(
            "\ud800" <= c <= "\udfff" or c in "\0\ufdd0\ufdd1" for c in text
        )
        expect(unfit, "a text that is refused for itself", error)
        return
    for phrase, (start, stop, head) in zip(parsed.phrases, wanted, strict=True):
        expect((phrase.start, phrase.stop) == (start, stop), f"{start}:{stop}", phrase)
        if head is not None:
            low, high = phrase.subject
            expect(high == head[1] and low <= head[0], f"the head {head}", phrase)
        else:
            expect(phrase.subject is None, "a composite without a subject", phrase)


def check_rules(data: bytes) -> bool:
    """Noun phrases of any text."""
    text = data.decode("utf-8", "surrogateescape")[:3000]
    phrases = noun_phrases(text)
    _spans(text, phrases)
    _resolved(text, phrases)
    return bool(phrases)


def check_reply(data: bytes) -> bool:
    """A model's list of phrases of a text."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        return False
    text, reply = found["text"], found.get("reply")
    reply = reply if isinstance(reply, str) else json.dumps(reply)
    phrases = parse_phrases(reply, text)
    _spans(text, phrases)
    _resolved(text, phrases)
    return True


TEXT = "A man in a black hat and two small dogs run on the beach, and a lot of people watch them."
LISTED = [{"text": "A man", "subject": "man"}, {"text": "two small dogs", "subject": "dogs"}]
CAPTIONS = {
    "caption": TEXT.encode(),
    "chart": b"The red bar (45 %) shows Dr. Smith's 1,234 tons of coal, iron and U.S. steel.",
    "quoted": 'The sign says "no entry"; a man\u2019s well-known black-and-white one.'.encode(),
}
FENCED = f"```json\n{json.dumps({'phrases': LISTED})}```"
PIECES = ("a ", "the ", " of ", " and ", ", ", "'s", "both ", "that ", "man", '"', "red ", "ly ")
TARGETS = (
    Target("noun_phrases", check_rules, CAPTIONS, "text", PIECES, 4),
    Target("phrase_reply", check_reply, {
        "two": json.dumps({"text": TEXT, "reply": {"phrases": LISTED}}).encode(),
        "fenced": json.dumps({"text": TEXT, "reply": FENCED}).encode(),
    }, "json", (*PIECES, "phrases", "text", "subject", "```json\n", "```"), 3,
        (BadPhrases, SampleError)),
)  # fmt: skip
