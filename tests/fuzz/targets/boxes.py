"""Boxes in answers: regions of the text's own characters inside the image, whatever is written."""

from __future__ import annotations

from groundkern.trainer.places.styles import STYLES
from groundkern.trainer.places.writing import Writer
from groundkern.trainer.prepare.boxes.finding import Reading
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from tests.fuzz.target import Target, expect
from tests.fuzz.targets.answers import SEEDS

SIZES = ((640, 480), (1, 4000))
MORE = (
    "<ref>a cat</ref><box>[[100, 200, 300, 400], [5, 5, 9, 9]]</box> and <box>(1,2),(3,4)</box>",
    "<phrase>a</phrase><object><patch_index_0044><patch_index_0863></object>",
    "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>",
    '[{"box_2d": [1, 2, 3, 4], "label": "a \\"b\\""}, {"point": [5, 6]}]',
)
READINGS = (Reading(), Reading("auto", "pixel"), Reading("qwen2.5", "unit"), Reading("per_mille"))


def _tied(data: bytes) -> bool:
    """Every reading in every style: spans in the text, boxes inside, a word outside keeps it."""
    text = data.decode("utf-8", "replace")
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} end"}]
    regions = [{"text": "end", "occurrence": text.count("end"), "points": [[0, 0]]}]
    record = {"images": ["a.png"], "messages": messages, "regions": regions}
    for i, reading in enumerate(READINGS):
        size = SIZES[i % 2]
        for name in (None, *STYLES):
            writer = None if name is None else Writer(name)
            made, counts = BoxSettings(reading, writer)(record, [size], "a:1")
            answer = made["messages"][1]["content"]
            expect(name is not None or answer == messages[1]["content"], "the text", answer)
            expect(all(count > 0 for count in counts.values()), "counts above 0", counts)
            first = made["regions"][0]
            start, stop = first.get("char_span", (len(answer) - 3, len(answer)))
            expect(answer[start:stop] == "end", "the words of a region to stay", answer)
            for region in made["regions"][1:]:
                start, stop = region["char_span"]
                expect(0 <= start < stop <= len(answer), "a span in the answer", region)
                for place in [region["box"]] if "box" in region else region["points"]:
                    inside = all(0 <= v <= size[k % 2] + 1e-3 for k, v in enumerate(place))
                    expect(inside, "a place inside the image", region)
    return True


TARGETS = [
    Target(
        "boxes",
        _tied,
        {f"seed {i}": seed.encode() for i, seed in enumerate((*SEEDS, *MORE))},
        "text",
        pieces=(*SEEDS, *MORE, "```json", "[", "]", "}", ", ", " ; ", "<", ">", "9" * 400),
    )
]
