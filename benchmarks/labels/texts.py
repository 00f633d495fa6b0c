"""Words of many scripts, numbers as in charts and tables, and words in punctuation."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

_LINES = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
WORDS = {language: words.split() for language, _, words in (x.partition(": ") for x in _LINES)}
LANGUAGES = {
    "English": "en", "Chinese": "zh", "Japanese": "ja", "Korean": "ko", "Arabic": "ar",
    "Persian": "fa", "Hebrew": "he", "Hindi": "hi", "Tamil": "ta", "Russian": "ru", "Greek": "el",
    "Vietnamese": "vi",
}  # fmt: skip
WRAPS = (
    *("({})", "[{}]", '"{}"', "“{}”", "‘{}’", "«{}»", "「{}」", "（{}）", "*{}*", "_{}_", "#{}"),
    *("{},", "{}.", "{}:", "{}…", "{}、", "{}。", "—{}", "- {}", "•{}", "¿{}?", "{}!"),
)


def words(language: str, count: int) -> list[str]:
    """The most frequent words of a language by the package `wordfreq`, or those typed here.

    Args:
        language: one of WORDS.
        count: how many at most.

    Returns:
        Words without digits, most frequent first.
    """
    if language not in LANGUAGES or find_spec("wordfreq") is None:
        return WORDS[language][:count]
    import wordfreq

    frequent = wordfreq.top_n_list(LANGUAGES[language], 2 * count)
    if language == "Chinese":  # its list holds foreign words too
        frequent = [each for each in frequent if "\u3400" <= each[0] <= "\u9fff"]
    return [each for each in frequent if not any(map(str.isnumeric, each))][:count]


def numbers(count: int, *, seed: int = 0) -> list[str]:
    """Numbers as charts, tables, invoices and calendars have them.

    Args:
        count: how many.
        seed: of the choice.
    """
    dice = random.Random(seed)

    def integer() -> str:
        return str(round(10 ** dice.uniform(0, 6)))

    def grouped() -> str:
        return f"{round(10 ** dice.uniform(3, 7)):,}"

    def decimal() -> str:
        return f"{10 ** dice.uniform(-1, 4):.{dice.choice((1, 2, 3))}f}"

    def percent() -> str:
        return f"{dice.uniform(0, 100):.{dice.choice((0, 1, 2))}f}%"

    def currency() -> str:
        amount = f"{10 ** dice.uniform(0, 5):,.{dice.choice((0, 2))}f}"
        return dice.choice(("${}", "€{}", "£{}", "¥{}", "{}€", "({})", "-${}")).format(amount)

    def date() -> str:
        year, month, day = dice.randint(1950, 2030), dice.randint(1, 12), dice.randint(1, 28)
        forms = (f"{year}", f"{year}-{month:02}-{day:02}", f"{day:02}.{month:02}.{year}")
        return dice.choice((*forms, f"{month}/{day}/{year % 100:02}", f"{year}/{month:02}"))

    def other() -> str:
        n = dice.randint(1, 400)
        minute, unit = dice.randint(0, 59), dice.choice(("k", "M", "kg", "cm", "°C", "x"))
        forms = (f"-{n}", f"+{n / 10:.1f}", f"±{n}", f"{n % 24}:{minute:02}", f"{n}{unit}")
        end = {1: "st", 2: "nd", 3: "rd"}.get(n % 10 if n % 100 not in (11, 12, 13) else 0, "th")
        return dice.choice((*forms, f"{n}{end}", f"#{n}", f"~{n}"))

    kinds = (integer, grouped, decimal, percent, currency, date, other)
    return [dice.choice(kinds)() for _ in range(count)]


def wrapped(texts: list[str]) -> list[str]:
    """Words with punctuation around them, each in another.

    Args:
        texts: the words.
    """
    return [WRAPS[index % len(WRAPS)].format(text) for index, text in enumerate(texts)]
