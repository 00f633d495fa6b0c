"""docs/data/data-format.md: its examples are samples."""

import json
import re
from pathlib import Path

from groundkern.trainer.data.record import PhraseRecord, RegionRecord, SampleRecord, WordRecord


def test_examples_of_the_documentation_are_valid():
    text = Path(__file__).parents[2].joinpath("docs", "data", "data-format.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    samples = [json.loads(block) for block in blocks if "messages" in block]
    lines = [block.splitlines() for block in blocks if "messages" not in block]
    assert len(samples) == 6
    assert [len(each) for each in lines] == [1, 7, 6, 2, 1]
    (videos,) = lines.pop(0)
    for sample in (*samples, {**samples[0], **json.loads(videos)}):
        SampleRecord.model_validate(sample)
    for kind, each in zip([RegionRecord, RegionRecord, WordRecord, PhraseRecord], lines):
        for line in each:
            kind.model_validate_json(line)
