"""Which language a text is in, as far as its letters and its commonest words tell."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# The first word of a letter's name in Unicode -> what people call it.
_SCRIPTS = {
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "CJK": "Chinese",
    "HANGUL": "Korean",
}
SCRIPTS = (
    *("Japanese", "Chinese", "Korean", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari"),
    *("Bengali", "Tamil", "Telugu", "Thai", "Georgian", "Armenian", "Latin"),
)
OTHER = "of another script"
_MOSTLY = 0.5  # share of letters that decides
_KANA = 0.1  # share of kana from which Chinese characters are Japanese
_WORDS = {
    "English": "the a an of and is are in on with to that this it its at by from for has",
    "German": "der die das den dem ein eine einen und ist sind mit auf im nicht von zu für am",
    "French": "le la les des une est sont et dans sur avec du au aux qui pas pour il elle ce",
    "Spanish": "el la los las una es está y en con del al por para que se no un su lo",
    "Italian": "il lo la gli una è di del della che con sono e nel per un si al le",
    "Portuguese": "o os as uma um é de do da em no na com que não para e ao por",
    "Dutch": "de het een en is van op met zijn in niet aan dat te voor naar er die",
}
LANGUAGES = tuple(language for language in _WORDS if language != "English")
_COMMON = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_FEWEST = 4  # words of another language, and twice as many as of English
# Languages of spaCy's pipelines that are not written in Latin letters.
_WRITTEN = {
    "ja": {"Japanese", "Chinese"},
    "zh": {"Chinese"},
    "ko": {"Korean"},
    "ru": {"Cyrillic"},
    "uk": {"Cyrillic"},
    "mk": {"Cyrillic"},
    "bg": {"Cyrillic"},
    "el": {"Greek"},
    "xx": None,
}


def script_of(text: str) -> str | None:
    """What most letters of a text belong to, one of `SCRIPTS` or `OTHER`.

    Returns:
        None if they are Latin, or there are none.
    """
    counts: Counter[str] = Counter()
    for character in text:
        if character.isalpha():
            name = unicodedata.name(character, "UNKNOWN").replace("-", " ").split()
            name = name[1:] if name[0] in ("FULLWIDTH", "HALFWIDTH") else name
            counts[_SCRIPTS.get(name[0], name[0].capitalize())] += 1
    if not counts:
        return None
    letters = sum(counts.values())
    if counts["Japanese"] >= _KANA * letters:
        counts["Japanese"] += counts.pop("Chinese", 0)
    script, most = counts.most_common(1)[0]
    if script == "Latin" or most < _MOSTLY * letters:
        return None
    return script if script in SCRIPTS else OTHER


def language_of(text: str) -> str | None:
    """The language other than English that a text in Latin letters looks like; None: English, or
    too few of its words tell."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {name: sum(word in common for word in words) for name, common in _COMMON.items()}
    english = counts.pop("English")
    language = max(counts, key=counts.__getitem__)
    return language if counts[language] >= max(_FEWEST, 2 * english + 1) else None


def reads(pipeline: str, script: str | None) -> bool:
    """Whether a spaCy pipeline of a language, by its code, is made for a script of `script_of`."""
    wanted = _WRITTEN.get(pipeline, {None})
    return wanted is None or script in wanted
