"""Forms whose questions are linked to their answers: what FUNSD and XFUND share.

An entity has `id`, `text`, `label` (question, answer, header, other), `box` [x0, y0, x1, y1] in
pixels, `words` of `text` and `box`, and `linking`, pairs of ids. A question and the answers that it
is linked to, in reading order, are one sample; each word of an answer is a region of its own. All
words of the page are `words`. What a page asks and answers several times ("Date:") is passed over,
since the question alone does not say which of them is meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import Frame, Phrasing, field_of, numbers, size_of
from groundkern.trainer.prepare.sources import Item, Unusable
from groundkern.trainer.records import chat_sample

PHRASING = (Phrasing('What is filled in for "{question}"?', "{answer}"), ("question", "answer"))
BETWEEN = "\n"  # answers of one question


def questions(entities: Any, image: str, where: str) -> Iterator[tuple[str, Any]]:
    """The questions of a page with their answers, and all of its words.

    Args:
        entities: of the page, as the file has them.
        image: the page's path below the root.
        where: what their names start with.
    """
    if not isinstance(entities, list) or not all(isinstance(e, dict) for e in entities):
        yield where, Unusable(entities, "expected a list of entities, objects")
        return
    known = {e["id"]: e for e in entities if isinstance(e.get("id"), int | str)}
    linked = _links(entities)
    words = [word for e in entities for word in _words(e)]
    found = []
    for i, entity in enumerate(entities):
        if entity.get("label") == "question":
            number = entity.get("id") if isinstance(entity.get("id"), int | str) else None
            others = [known[other] for other in linked.get(number, ()) if other in known]
            answers = [other for other in others if other.get("label") == "answer"]
            said = [answer for answer in answers if _text(answer)]
            found.append((f"{where}[{i}]", entity, others, answers, said))
    times = Counter(_asked(entity) for _, entity, *_, said in found if said)
    for there, entity, others, answers, said in found:
        if not _text(entity):
            kind, why = "questions without text", "`text`: expected a question, got none"
            yield there, Unusable(entity, why, kind)
        elif not said:
            kind = "questions with an empty answer" if answers else "questions without an answer"
            got = ", ".join(sorted({str(other.get("label"))[:20] for other in others})) or "nothing"
            yield there, Unusable(entity, f"`linking`: expected an answer, got {got}", kind)
        elif (number := times[_asked(entity)]) > 1:
            kind = "questions that a page asks several times"
            why = f"`text`: expected {_text(entity)!r:.80} to be asked once, got {number} times"
            yield there, Unusable(entity, why, kind)
        else:
            yield there, {"image": image, "question": entity, "answers": said, "words": words}


def _links(entities: list[dict]) -> dict[Any, list]:
    """The ids that each id is linked to, in the order of the file, once each."""
    found: dict[Any, dict] = {}
    for entity in entities:
        links = entity.get("linking")
        for link in links if isinstance(links, list) else ():
            if isinstance(link, list) and len(link) == 2:
                first, second = link
                if all(isinstance(end, int | str) for end in link):
                    found.setdefault(first, {})[second] = True
                    found.setdefault(second, {})[first] = True
    return {number: list(others) for number, others in found.items()}


def _text(entity: dict) -> str:
    text = entity.get("text")
    return text.strip() if isinstance(text, str) else ""


def _asked(entity: dict) -> str:
    """A question without what does not tell it from another: spaces, and the case of letters."""
    return " ".join(_text(entity).split()).casefold()


def _words(entity: dict) -> list[dict]:
    words = entity.get("words")
    return [w for w in words if isinstance(w, dict) and _text(w)] if isinstance(words, list) else []


def _in_reading_order(answers: list[dict], where: str) -> list[dict]:
    """Rows from top to bottom, each from left to right: files link answers in any order."""
    if len(answers) < 2:
        return answers
    placed = [(numbers(e.get("box"), 4, where, "answer.box"), e) for e in answers]
    rows: list[list[tuple[list[float], dict]]] = []
    for box, entity in sorted(placed, key=lambda each: each[0][1]):
        if rows and box[1] + box[3] < 2 * rows[-1][-1][0][3]:  # its middle is above the other's end
            rows[-1].append((box, entity))
        else:
            rows.append([(box, entity)])
    return [e for row in rows for _, e in sorted(row, key=lambda each: each[0][0])]


def convert_question(item: Item, options: Options, task: str) -> Made:
    """One question; its regions are the words of its answers."""
    row, where = item.value, item.where
    size = size_of(row["image"], options.root, where)
    frame = Frame(*size, options.overhang, where)
    answer, parts = "", []
    for entity in _in_reading_order(row["answers"], where):
        text = field_of(entity, "text", str, where).strip()
        start = len(answer) + len(BETWEEN) if answer else 0
        answer = answer + BETWEEN + text if answer else text
        parts += [(start + a, start + b, box) for a, b, box in printed(text, entity)]
    phrasing = options.phrasing(PHRASING[0])
    values = {"question": _text(row["question"]), "answer": answer}
    said, span = phrasing.filled(values)
    tied = said[slice(*span)] == answer  # else the template ties something else to the place
    regions, counts = [], {"regions": 0, "boxes_cut": 0, "words": 0, "words_outside": 0}
    for start, stop, values_of_box in parts:
        box, cut = frame.box(values_of_box, "answer.box")
        where_said = [span[0] + start, span[0] + stop] if tied else list(span)
        regions.append({"char_span": where_said, "box": box})
        counts["boxes_cut"] += cut.get("boxes_cut", 0)
    question = phrasing.question.format_map(values)
    sample = chat_sample([row["image"]], question, said, task=task, regions=regions)
    words = []
    for word in row["words"]:
        try:
            box, _ = frame.box(word.get("box"), "words.box")
        except SampleError:
            counts["words_outside"] += 1
        else:
            words.append({"text": _text(word), "box": box})
    counts |= {"regions": len(regions), "words": len(words)}
    return Made([{**sample, "words": words}], {}, counts)


def printed(text: str, entity: dict) -> list[tuple[int, int, Sequence]]:
    """(start, stop, box) of the words of a text; of all of it where they are not those printed."""
    found, at = [], 0
    for word in _words(entity):
        start = text.find(_text(word), at)
        if start < 0 or text[at:start].strip():
            return [(0, len(text), entity.get("box"))]
        at = start + len(_text(word))
        found.append((start, at, word.get("box")))
    if not found or text[at:].strip():
        return [(0, len(text), entity.get("box"))]
    return found
