"""`groundkern prepare marks`, the command."""

import json

from PIL import Image

from benchmarks.preparing.charts import draw_chart
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.program import main


def write_samples(folder, samples):
    folder.mkdir(exist_ok=True)
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def chart_sample(folder, seed, **more):
    """A sample of a drawn chart with its words as `prepare words` would write them."""
    chart = draw_chart(seed)
    chart.image.save(folder / f"{seed}.png")
    words = [{"text": w.text, "box": [round(x, 2) for x in w.box]} for w in chart.words]
    return {
        "images": [f"{seed}.png"],
        "messages": [
            {"role": "user", "content": "What is shown?"},
            {"role": "assistant", "content": chart.answer},
        ],
        "words": words,
        **more,
    }, chart


def test_command_writes_regions_and_keeps_the_rest(tmp_path, capsys):
    sample, chart = chart_sample(tmp_path, 1)
    before = {"text": chart.answer[:3], "box": [0, 0, 5, 5]}
    text_only = {"messages": [{"role": "assistant", "content": "12"}]}
    broken = {**sample, "images": ["gone.png"]}
    path = write_samples(tmp_path, [sample, {**sample, "regions": [before]}, text_only, broken])
    out = tmp_path / "out" / "marked.jsonl"
    command = ["prepare", "marks", str(path), "--output", str(out), "--workers", "1"]
    assert main(command) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[1]["regions"] == [before] and "regions" not in lines[2] and len(lines) == 3
    resolved = parse_sample(lines[0], root=tmp_path, where="out")
    spans = {(region.start, region.stop) for region in resolved.regions}
    assert {(link.start, link.stop) for link in chart.links} <= spans
    assert lines[0]["words"] == sample["words"]
    assert "gone.png" in (tmp_path / "out" / "marked.jsonl.rejected.jsonl").read_text()
    assert "samples with regions" in capsys.readouterr().out
    assert main([*command, "--replace"]) == 2, "other settings"


def test_command_finds_the_answer_of_each_turn_in_each_image(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 100), "white").save(tmp_path / name)
    sample = {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "12 and 12 again"},
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "34"},
        ],
        "words": [
            {"text": "12.0", "image": 0, "box": [10, 10, 30, 20]},
            {"text": "34", "image": 1, "box": [0.1, 0.1, 0.3, 0.2], "coord": "unit"},
        ],
    }
    out = tmp_path / "marked.jsonl"
    path = write_samples(tmp_path, [sample])
    assert main(["prepare", "marks", str(path), "--output", str(out), "--workers", "1"]) == 0
    assert json.loads(out.read_text())["regions"] == [
        {"text": "12", "turn": 1, "image": 0, "box": [10.0, 10.0, 30.0, 20.0]},
        {"text": "12", "occurrence": 1, "turn": 1, "image": 0, "box": [10.0, 10.0, 30.0, 20.0]},
        {"text": "34", "turn": 3, "image": 1, "box": [10.0, 10.0, 30.0, 20.0]},
    ]
