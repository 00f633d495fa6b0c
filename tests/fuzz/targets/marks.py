"""`prepare marks`: tokens of any text, phrases found in print, replies with marks; OCR's output."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.marks.grouping import (
    PrintedWord,
    blocks_of,
    lines_of,
    scale_numbers,
)
from groundkern.trainer.prepare.marks.labeller import BadMarks, parse_marks
from groundkern.trainer.prepare.marks.matching import PrintedText
from groundkern.trainer.prepare.marks.normalise import tokens, unconfused, value
from groundkern.trainer.prepare.ocr.paddle import joined
from groundkern.trainer.prepare.ocr.tesseract import tsv_words
from tests.fuzz.target import Target, expect, json_object


def check_tokens(data: bytes) -> bool:
    """Tokens in order, each what stands in the text; accents do not count.

    Tokens share characters only if one character is several: U+337F is a word of four ideographs.
    """
    text = data.decode("utf-8", "surrogateescape")
    found = tokens(text)
    at, end = 0, 0
    for token in found:
        expect(at <= token.start < token.stop <= len(text), f"a span from {at} on", token)
        expect(end <= token.stop, f"a span to {end} or more", token)
        expect(token.surface == text[token.start : token.stop], "the text's characters", token)
        low, high = token.outer
        expect(low <= token.start and token.stop <= high <= len(text), "a span around", token)
        expect(bool(token.key), "a key", token)
        at, end = token.start, token.stop
        if token.number:
            expect(value(token.key.removeprefix("-")) == token.key.removeprefix("-"),
                   "a number in its normal form", token)  # fmt: skip
        mixed = unconfused(token.key)
        expect(mixed is None or unconfused(mixed) in (mixed, None), "a fixed point", token)
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, text)
        if other == text:
            continue
        keys = [token.key for token in tokens(other)]
        expect(keys == [token.key for token in found], f"the same keys in {form}", text[:60], keys)
    expect([t.key for t in tokens(f" {text} ")] == [t.key for t in found], "the same keys", text)
    return bool(found)


def _words(entries: Any) -> list[PrintedWord] | None:
    if not isinstance(entries, list):
        return None
    words = []
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 5 or not isinstance(entry[0], str):
            continue
        text, *box = entry
        if not all(isinstance(v, int | float) and abs(v) < 1e4 for v in box):
            continue
        x0, y0, x1, y1 = map(float, box)
        if text.strip() and x0 < x1 and y0 < y1:  # what `read_words` and samples guarantee
            words.append(PrintedWord(text, (x0, y0, x1, y1), 0))
    return words


def check_matching(data: bytes) -> bool:
    """Phrases of an answer that are printed: spans in order, boxes of words, nothing twice."""
    found = json_object(data)
    words, answer = _words(found.get("words")), found.get("answer")
    if words is None or not isinstance(answer, str) or len(answer) > 2000 or len(words) > 60:
        return False
    lines = lines_of(words)
    inside = [word for line in lines for word in line.words]
    expect(sorted(map(id, inside)) == sorted(map(id, words)), "each word in one line", lines)
    chained = [line for block in blocks_of(lines) for line in block]
    expect(sorted(map(id, chained)) == sorted(map(id, lines)), "each line in one block", lines)
    expect(scale_numbers(lines) <= set(lines), "ticks among the lines", lines)
    boxes = [word.box for word in words]
    for scales in (("last", "keep", "drop")[len(data) % 3],):
        printed = PrintedText(words, scales=scales)
        for ambiguous in ("union", "drop"):
            at = 0
            for match in printed.matches(answer, ambiguous):
                expect(at <= match.start < match.stop <= len(answer), f"from {at} on", match)
                at = match.stop
                expect(bool(match.places), "a place", match)
                expect(len(set(match.places)) == len(match.places), "each place once", match)
                for place in match.places:
                    expect(_around(place.box, boxes), "a box around words", place)
    for line in lines:
        keys = tokens(line.text)
        expect(not keys or PrintedText(words, scales="keep").holds(line.text), "its line", line)
    return True


def _around(box: tuple, boxes: list[tuple]) -> bool:
    """Whether a box begins and ends in words: one that holds other tokens too is cut."""
    x0, y0, x1, y1 = box
    across = any(b[0] <= x0 < b[2] for b in boxes) and any(b[0] < x1 <= b[2] for b in boxes)
    upright = any(b[1] == y0 for b in boxes) and any(b[3] == y1 for b in boxes)
    return across and upright and x0 < x1


def check_reply(data: bytes) -> bool:
    """A reply with marks: what is taken is the answer, and marks written anew come back."""
    found = json_object(data)
    reply, answer = found.get("reply"), found.get("answer")
    if not isinstance(reply, str) or not isinstance(answer, str):
        return False
    marks = parse_marks(reply, answer, {"1", "2", "30"})
    plain = re.sub(r"<MARK \d+(?: ?, ?\d+)*>|</MARK>", "", reply.strip())
    expect(plain == answer.strip(), "the answer without its marks", plain)
    written, at = "", 0
    for mark in marks:
        expect(at <= mark.start < mark.stop <= len(answer), f"a span from {at} on", mark)
        expect(bool(answer[mark.start : mark.stop].strip()), "a phrase", mark)
        expect(set(mark.ids) <= {"1", "2", "30"}, "known ids", mark)
        phrase = answer[mark.start : mark.stop]
        written += f"{answer[at : mark.start]}<MARK {', '.join(mark.ids)}>{phrase}</MARK>"
        at = mark.stop
    again = parse_marks(written + answer[at:], answer, {"1", "2", "30"})
    expect(again == marks, "the same marks when written anew", again, marks)
    return True


def check_tsv(data: bytes) -> bool:
    """Tesseract's table: words with boxes and confidences, or one sentence."""
    for text, box, confidence, line, _ in tsv_words(data.decode("utf-8", "replace")):
        expect(isinstance(text, str), "a text", text)
        expect("\t" not in text and "\n" not in text, "a cell of a line", text)
        expect(len(box) == 4 and all(isinstance(edge, int) for edge in box), "a box", box)
        expect(0 <= confidence <= 1 and line >= 0, "a share and a number", confidence, line)
    return True


def check_paddle(data: bytes) -> bool:
    """PaddleOCR's pieces of a printed line joined to words: all of them, in order."""
    found = json_object(data)
    printed, pieces = found.get("printed"), found.get("pieces")
    if not isinstance(printed, str) or not isinstance(pieces, list):
        return False
    pieces = [piece for piece in pieces if isinstance(piece, str)]
    regions = [[[i, 0], [i + 1, 0], [i + 1, 2], [i, 2]] for i in range(len(pieces))]
    words = list(joined(printed, pieces, regions))
    got = "".join(text for text, _ in words)
    expect(got == "".join("".join(pieces).split()), "the pieces' characters", got)
    for text, (x0, y0, x1, y1) in words:
        expect(bool(text) and not any(c.isspace() for c in text), "a word", text)
        expect(0 <= x0 < x1 <= len(pieces) and (y0, y1) == (0, 2), "a box in its piece", text)
    return bool(words)


TEXTS = {
    "number": "It cost $1,234.50 (45 %), or 1.234,5 \u20ac; -12.0 \u2013 \u22127 and 007.".encode(),
    "words": "Bob's na\u00efve caf\u00e9, e.g. U.S.A. 3\u00bd of Q1 \u201cql\u201d".encode(),
    "scripts": "\u56fe\u4e2d\u6709 \u4f60\u597d \u0e01\u0e33 \uac00\ub098 \u30ab\u3099 x1".encode(),
}
PIECES = ("1", "10", "1 234", "%", "per cent", "$", "'s", ".", ",", "-", "\u2044", "l", "O", "the")
TABLE = "level page_num block_num par_num line_num word_num left top width height conf text"
TABLE = TABLE.replace(" ", "\t")
ROW = "5\t1\t1\t1\t1\t1\t10\t20\t30\t40\t96.5\tcoal"
PRINTED = {
    "words": [["coal", 0, 0, 20, 10], ["mined", 24, 0, 50, 10], ["1854", 0, 20, 20, 30],
              ["10", 60, 0, 70, 10], ["20", 60, 30, 70, 40], ["30", 60, 60, 70, 70]],
    "answer": "Coal mined in 1854 was 20.",
}  # fmt: skip
REPLY = {"reply": "<MARK 1>Coal</MARK> in <MARK 2, 30>1854</MARK>.", "answer": "Coal in 1854."}
PADDLE = {"printed": "It's 45%, \u56fe ok", "pieces": ["It", "'", "s", "45", "%, ", "\u56fe", "ok"]}
MARKS = ("<MARK 1>", "<MARK 2, 30>", "</MARK>", "<MARK 9>", "<mark 1>", "<MARK 01>", " ")
TARGETS = (
    Target("tokens", check_tokens, TEXTS, "text", PIECES, 6),
    Target("matching", check_matching, {"chart": json.dumps(PRINTED).encode()}, "json", PIECES, 2),
    Target("marked_reply", check_reply, {"two": json.dumps(REPLY).encode()}, "json", MARKS, 4,
           (BadMarks,)),
    Target("tesseract", check_tsv, {"row": f"{TABLE}\n{ROW}\n{ROW}\n".encode()}, "text",
           ("\t", "5", "-1", "1e9", "\n"), 2, (SampleError,)),
    Target("paddle", check_paddle, {"line": json.dumps(PADDLE).encode()}, "json", PIECES, 2),
)  # fmt: skip
