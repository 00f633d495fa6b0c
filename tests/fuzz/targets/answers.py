"""What a model may write, through every metric of an answer: values in their bounds, no error."""

from __future__ import annotations

from groundkern.hf.data.example import Region
from groundkern.trainer.metrics.golds import Gold
from groundkern.trainer.metrics.registry import METRICS, default_metrics
from tests.fuzz.target import Target, expect

GOLDS = (
    Gold(("row 3 column 5", "3, 5"), size=(640, 480)),
    Gold(("year | a | b\n1999 | 1,200 | 5%",)),
    Gold(("red bus", "2", "don't"), ("red bus", "2", "2", "don't"), said="percent"),
    Gold(("[100, 200, 500, 500]",), size=(640, 480), resized=(644, 476), said="resized"),
    Gold(
        ("2008",),
        size=(640, 480),
        coord="pixel",
        regions=(
            Region(1, 0, 4, 0, boxes=((0.1, 0.2, 0.5, 0.5),), points=((0.5, 0.5),)),
            Region(1, 0, 4, 0, polygons=(((0.1, 0.1), (0.9, 0.1), (0.5, 0.9)),)),
        ),
    ),
)
SEEDS = (
    "row 3 column 5",
    "US$ -1,234.5 %",
    "[10.4, 'B']",
    "| Year | a |\n|---|:-:|\n| 1999 | 2 \\| 3 |",
    "TITLE | t <0x0A> year | a <0x0A> 1999 | 5",
    'year,a\n1999,"1,200"',
    "<|box_start|>(100,200),(300,400)<|box_end|>",
    "<box>[[100, 200, 300, 400]]</box>",
    "<loc0256><loc0512><loc0768><loc1023> dog",
    "car<loc_52><loc_333><loc_932><loc_774>",
    "<patch_index_0044><patch_index_0863>",
    '```json\n[{"bbox_2d": [64, 96, 320, 240], "label": "cat"}]\n```',
    '<points x1="9.1" y1="11.7" x2="17.2" y2="41.3" alt="boats">boats</points>',
    '<points coords="1 1 073 160 2 173 600">boats</points>',
)


def _measured(data: bytes) -> bool:
    """Each metric of a predicted text; the text as its own gold is right."""
    text = data.decode("utf-8", "replace")
    own = Gold((text,), size=(640, 480))
    for gold in (*GOLDS, own):
        for name, metric in METRICS.items():
            total, count = metric.score(text, gold)
            expect(0 <= total < float("inf") and count >= 0, f"{name} from 0", total, count)
            most = count + 1e-9 if metric.higher_is_better else float("inf")
            expect(total <= most, f"at most {count} of {name}", total)
    for name in default_metrics(own):
        total, count = METRICS[name].score(text, own)
        right = abs(total - count) < 1e-9 if METRICS[name].higher_is_better else total == 0
        expect(right, f"{name} of a text against itself to be right", total, count)
    return True


TARGETS = [
    Target(
        "answers",
        _measured,
        {f"seed {i}": seed.encode() for i, seed in enumerate(SEEDS)},
        "text",
        pieces=(*SEEDS, "<0x0A>", "\u2212", "\u202f", "\ufb01", "9" * 400, "nan", "(", "]"),
    )
]
