"""VQA accuracy: an answer is as right as people agree with it.

Texts are made comparable by the rules of VQA's own code, since published figures are made so, and
not by those of `answers.normalise`, for which -5 is not 5. Number words and articles are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from groundkern.trainer.metrics.answers import without_articles

ENOUGH_VOTES = 4  # of fewer answers, none can be as right as 1
_AGREE = 3  # other people that an answer has to agree with

_PUNCTUATION = ';/[]"{}()=+\\_->@`,?!<'
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_POINT = re.compile(r"\.(?!\d)")
_HAVE = (
    "could've might've must've not've should've they've we've what've where've who've would've "
    "you've couldn't've hadn't've mightn't've shouldn't've wouldn't've"
)
_NOT = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't "
    "needn't oughtn't shan't shouldn't wasn't weren't won't wouldn't"
)
_WOULD = "he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd"
_WOULD_HAVE = (
    "he'd've it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've "
    "we'd've who'd've you'd've y'all'd've"
)
_WILL = "how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll"
_IS = (
    "he's how's somebody's someone's that's there's what's when's where's who's why's there're "
    "they're what're why're you're"
)
_OTHERS = "ma'am o'clock 'ow's'at 'twas y'all y'all'll"


def _one_apostrophe_less(words: str) -> dict[str, str]:
    """{a contraction that lacks one of its apostrophes: as it is written}."""
    return {
        word[:at] + word[at + 1 :]: word
        for word in words.split()
        for at, character in enumerate(word)
        if character == "'"
    }


CONTRACTIONS = _one_apostrophe_less(
    " ".join((_HAVE, _NOT, _WOULD, _WOULD_HAVE, _WILL, _IS, _OTHERS))
) | {"somebody'd": "somebodyd"}
"""What a word becomes, by VQA's table. It has no "id", "im", "ive", "shes", "well" or "its"."""


def vqa_accuracy(predicted: str, votes: Sequence[str]) -> float:
    """How many people gave this answer: mean over the votes of min(1, others that agree / 3).

    Each of the n votes is left out in turn, and the answer is right as far as three of the others
    are the same text after `vqa_words`. Of ten, one vote for it is worth .3, two .6, three .9, and
    four or more 1.

    Where VQA's code looks at the case and articles of the prediction alone (its own votes have
    none), and at nothing if all votes are the same, both sides are treated alike here, as in the
    code of TextVQA's challenge.

    Args:
        predicted: what the model wrote.
        votes: the answers of people, each as often as it was given.

    Returns:
        0 without votes.

    Source: Antol et al., VQA, arXiv 1505.00468, section 3; Goyal et al., arXiv 1612.00837, and its
    evaluation code, vqaEval.py.
    """
    said = vqa_words(predicted)
    agree = sum(vqa_words(vote) == said for vote in votes)
    if not agree:
        return 0.0
    without_one = agree * min(1.0, (agree - 1) / _AGREE)
    return (without_one + (len(votes) - agree) * min(1.0, agree / _AGREE)) / len(votes)


def vqa_words(text: str) -> str:
    """A text by the rules of VQA's code.

    Without case and articles; "none" and "zero" to "ten" as digits; an apostrophe that a
    contraction lacks is put in. Punctuation becomes a space; a mark that has a space beside it
    somewhere in the text goes without one, and so does every mark of a text with a comma between
    digits, so that 1,000 is 1000. A point goes unless a digit follows. Apostrophes, colons, `$` and
    `%` stay.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = _BETWEEN_DIGITS.search(text) is not None
    gaps = {}
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        gaps[ord(mark)] = "" if beside or grouped else " "
    words = without_articles(_POINT.sub("", text.translate(gaps)).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words)
