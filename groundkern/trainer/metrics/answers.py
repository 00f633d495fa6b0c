"""Metrics of short answers, each a number from 0 to 1 for one sample; several golds: the best.

A predicted text is whatever a model wrote: no text raises. Where a metric differs from the code of
the paper that it is named after, its docstring says so, and the paper's own rule has a name too.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from groundkern.trainer.metrics.numbers import Number, is_year, number, tidy

TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5

Golds = str | Sequence[str]

_SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SQUAD_PUNCTUATION = str.maketrans("", "", string.punctuation)
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WITHIN_WORDS = re.compile(r"(?<=[^\W\d_])['\u2019.](?=[^\W\d_])|(?<=[^\W\d_])\.(?!\w)")
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_SPOKEN = {"none": "0", **{word: str(i) for i, word in enumerate(_DIGITS)}}
_NAMED = re.compile(r"(?<![^\W\d_])([^\W\d_]+)\s*[:=#]?\s*(-?\d+)")
_WHOLE = re.compile(r"(?<![\d.])-?\d+(?![\d.]*\d)")


def best(metric: Callable[[str, str], float], predicted: str, gold: Golds) -> float:
    """The highest value of `metric` over the golds; 0 if there are none."""
    golds = [gold] if isinstance(gold, str) else gold
    return max((float(metric(predicted, each)) for each in golds), default=0.0)


def relaxed_accuracy(predicted: str, gold: Golds) -> float:
    """Whether an answer is right within 5 % if it is a number, and else the same text.

    With p and g the numbers, right is |p - g| <= 0.05 |g|: the gold value is the denominator. A
    gold 0 wants 0. A gold that is a **year** wants p = g: 2010 for 2008 is wrong, though 0.1 % off.
    A year is a gold of four digits from 1500 to 2099 and nothing else; `2,010`, `$2010` and
    `2010.0` are quantities. (A quantity that is written like a year has to be exact, too: the
    gold's form decides, because the question is not looked at.)

    Numbers are read as `numbers.number` says: signs, separators, currencies. With a percent sign on
    both sides or on neither the numbers are compared as they stand; with one sign, n % may be n or
    n / 100, since charts leave the sign to their title. Texts are compared without case, in NFKC,
    white space as one space, and without a full stop that ends just the prediction.

    A gold `[a, b]`, or one of numbers with `, ` between, is a list: the value is the share of items
    that are right, in order, of the longer list.

    It differs from the code of pix2struct (`relaxed_accuracy_pix2struct`), which lmms-eval and
    VLMEvalKit have taken over: years, 0 (there `0.0` for `0` is wrong), separators and currencies,
    one percent sign, white space, the full stop, and lists, which are ChartQAPro's.

    Args:
        predicted: what the model wrote.
        gold: the right answer, or several of which one will do.

    Returns:
        1.0 or 0.0; of a list, a share.

    Source: Masry et al., ChartQA, arXiv 2203.10244, section 5.1; years and lists: ChartQAPro, arXiv
    2504.05506.
    """
    return best(_relaxed, predicted, gold)


def relaxed_accuracy_pix2struct(predicted: str, gold: Golds) -> float:
    """`relaxed_accuracy` as published figures use it: the rule of pix2struct's code.

    Numbers are what Python's float() reads; `n%` is n / 100; a gold that is 0 or no number is
    compared as text, case aside. Years have the tolerance of 5 %.

    Source: github.com/google-research/pix2struct, metrics.py, `relaxed_correctness`.
    """

    def relaxed(predicted: str, gold: str) -> bool:
        p, g = _pix2struct_float(predicted), _pix2struct_float(gold)
        if p is not None and g:
            return abs(p - g) / abs(g) <= TOLERANCE
        return predicted.lower() == gold.lower()

    return best(relaxed, predicted, gold)


def _pix2struct_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed(predicted: str, gold: str) -> float:
    golds = _items(gold)
    if golds is None:
        return _relaxed_item(predicted, gold)
    found = _items(predicted, numbers=False)
    right = [_relaxed_item(p, g) for p, g in zip(found, golds, strict=False)]
    return sum(right) / max(len(found), len(golds))


def _items(text: str, *, numbers: bool = True) -> list[str] | None:
    """The items of a list; None if `numbers` asks for numbers where there are no brackets."""
    text = tidy(text)
    inside = re.fullmatch(r"\[(.*)\]", text)
    items = [item.strip("'\" ") for item in re.split(r", ", inside[1] if inside else text)]
    if numbers and not inside and (len(items) < 2 or not all(map(number, items))):
        return None
    return items


def _relaxed_item(predicted: str, gold: str) -> float:
    p, g = number(predicted) or number(predicted.strip().removesuffix(".")), number(gold)
    if p is None or g is None:
        return float(_same_text(predicted, gold))
    if is_year(gold):
        return float(p == g)
    return float(_close(p, g))


def _close(p: Number, g: Number) -> bool:
    values = [p.value]
    if p.percent != g.percent:
        values.append(p.value / 100 if p.percent else p.value * 100)
    allowed = TOLERANCE * abs(g.value) * (1 + 1e-12)  # 5 % is still right, however it is rounded
    return any(abs(value - g.value) <= allowed for value in values)


def _same_text(predicted: str, gold: str) -> bool:
    predicted, gold = tidy(predicted).casefold(), tidy(gold).casefold()
    return gold in (predicted, predicted.removesuffix("."))


def anls(predicted: str, gold: Golds) -> float:
    """1 minus the edit distance over the longer length, and 0 where that is below a half.

    Case is ignored and white space is one space; punctuation and articles count. A similarity of
    just 0.5 is kept, as the evaluation script of the challenge and pix2struct do; the paper's
    equation (and the package anls) drops it. Two empty texts are the same: 1.

    Source: Biten et al., arXiv 1905.13648 and 1907.00490, equation 1; DocVQA, arXiv 2007.00398.
    """

    def similarity(predicted: str, gold: str) -> float:
        a, b = (" ".join(text.lower().split()) for text in (predicted, gold))
        value = Levenshtein.normalized_similarity(a, b)
        return value if value >= ANLS_THRESHOLD else 0.0

    return best(similarity, predicted, gold)


def exact_match(predicted: str, gold: Golds) -> float:
    """Whether the texts are the same, white space around them aside."""
    return best(lambda p, g: p.strip() == g.strip(), predicted, gold)


def contains(predicted: str, gold: Golds) -> float:
    """Whether the gold stands anywhere in the prediction, case and line breaks aside.

    It rewards long answers: one that lists everything is right. So a sample has to ask for it. An
    empty gold, which OCRBench does not have, wants an empty prediction.

    Source: Liu et al., OCRBench, arXiv 2305.07895, evaluation code.
    """

    def plain(text: str) -> str:
        return text.lower().strip().replace("\n", " ")

    return best(lambda p, g: _within(plain(p), plain(g)), predicted, gold)


def contains_formula(predicted: str, gold: Golds) -> float:
    """Whether the gold stands anywhere in the prediction, white space aside; case counts.

    OCRBench's rule for handwritten formulas (HME100k). An empty gold wants an empty prediction.

    Source: Liu et al., OCRBench, arXiv 2305.07895, evaluation code.
    """
    return best(lambda p, g: _within("".join(p.split()), "".join(g.split())), predicted, gold)


def _within(predicted: str, gold: str) -> bool:
    return gold in predicted if gold else not predicted


def normalised_match(predicted: str, gold: Golds) -> float:
    """Whether the texts are the same but for case, punctuation, articles and number words.

    See `normalise`. Two texts of which nothing is left (`?`, `the`) are the same only if they were.
    """

    def same(predicted: str, gold: str) -> bool:
        p, g = normalise(predicted), normalise(gold)
        return p == g if p or g else tidy(predicted) == tidy(gold)

    return best(same, predicted, gold)


def normalise(text: str) -> str:
    """The words of a text in NFKC, without case, punctuation and articles, numbers as digits.

    Numbers keep their sign and decimal point and lose the commas of thousands, so that -5 is not 5
    and 3.5 is not 35; "none" and "zero" to "ten" become digits, as in VQA's evaluation; symbols
    such as `$` and `%` go with the punctuation. Apostrophes and points within words leave no gap:
    "don't" is "dont", "U.S." is "us".

    Source: Antol et al., VQA, arXiv 1505.00468, evaluation code.
    """
    text = _WITHIN_WORDS.sub("", _GROUPS.sub("", tidy(text).casefold()))
    kept = (c if _belongs(text, i) else " " for i, c in enumerate(text))
    return " ".join(without_articles("".join(kept).split()))


def without_articles(words: Sequence[str]) -> list[str]:
    """Words in lower case without articles, "none" and "zero" to "ten" as digits."""
    spoken = (_SPOKEN.get(word, word) for word in words)
    return [word for word in spoken if word not in ("a", "an", "the")]


def _belongs(text: str, i: int) -> bool:
    """Whether a character belongs to a word or a number: a letter, a mark, a digit, a sign."""
    if unicodedata.category(text[i])[0] not in "PS":
        return True
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    if text[i] == ",":
        return before.isdigit() and after.isdigit()
    if text[i] == ".":
        return after.isdigit() and not before.isalpha()
    return text[i] == "-" and after.isdigit() and not before.isalnum()


def squad_match(predicted: str, gold: Golds) -> float:
    """Exact match of SQuAD's evaluation script: case, punctuation and articles aside.

    Unlike `normalised_match` it deletes all ASCII punctuation, within numbers too: -3.5 is 35.

    Source: Rajpurkar et al., SQuAD, arXiv 1606.05250, evaluate-v1.1.py.
    """
    return best(lambda p, g: _squad(p) == _squad(g), predicted, gold)


def token_f1(predicted: str, gold: Golds) -> float:
    """F1 of the words that prediction and gold share, as SQuAD's evaluation script has it.

    Words are counted as often as they occur. If nothing is left of either text after SQuAD's
    normalisation, the value is 1 if nothing is left of both (as in SQuAD 2.0), else 0.

    Source: Rajpurkar et al., SQuAD, arXiv 1606.05250, evaluate-v1.1.py; SQuAD 2.0, arXiv
    1806.03822.
    """

    def f1(predicted: str, gold: str) -> float:
        p, g = _squad(predicted).split(), _squad(gold).split()
        if not p or not g:
            return float(p == g)
        return 2 * sum((Counter(p) & Counter(g)).values()) / (len(p) + len(g))

    return best(f1, predicted, gold)


def _squad(text: str) -> str:
    text = text.lower().translate(_SQUAD_PUNCTUATION)
    return " ".join(_SQUAD_ARTICLES.sub(" ", text).split())


def coordinates(predicted: str, gold: Golds) -> tuple[float, float]:
    """How many whole numbers of the gold the prediction has right, and how many there are.

    Numbers that follow a word are compared with that of the same word ("column 5 row 3" has both of
    "row 3 column 5" right), the first where there are several. If the prediction lacks one of the
    gold's words, or the gold has none, the numbers are compared in their order.

    Args:
        predicted: what the model wrote.
        gold: such as "row 3 column 5" or "(3, 5)"; several: the one with the most right.

    Returns:
        (right, count): the accuracy of a data set is the sum of the former over that of the latter.
    """
    golds = [gold] if isinstance(gold, str) else gold
    counted = [_coordinates(predicted, each) for each in golds] or [(0.0, 0.0)]
    return max(counted, key=lambda pair: (pair[0] / pair[1] if pair[1] else 0.0, pair[1]))


def _coordinates(predicted: str, gold: str) -> tuple[float, float]:
    wanted = _WHOLE.findall(tidy(gold))
    names, found = _named(gold), _named(predicted)
    if len(names) == len(wanted) and set(names) <= set(found):
        return float(sum(found[name] == names[name] for name in names)), float(len(wanted))
    pairs = zip(_WHOLE.findall(tidy(predicted)), wanted, strict=False)
    return float(sum(_int(p) == _int(g) for p, g in pairs)), float(len(wanted))


def _named(text: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for name, value in _NAMED.findall(tidy(text).casefold()):
        named.setdefault(name, _int(value))
    return named


def _int(digits: str) -> str:
    """The number without leading zeros; text, since there may be any number of digits."""
    return f"{'-' * digits.startswith('-')}{digits.lstrip('-').lstrip('0') or '0'}"
