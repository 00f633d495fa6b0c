"""What a command imports before it has something to do: torch and transformers take seconds."""

from __future__ import annotations

import subprocess
import sys

from tests.sources import ROOT

PROGRAM = """
import json
import sys
from pathlib import Path
from groundkern.trainer.program import main
from groundkern.trainer.prepare.ocr import engines
from groundkern.trainer.prepare.ocr.settings import OcrWord

HEAVY = {"torch", "transformers", "peft", "datasets", "scipy", "openai", "onnxruntime"}

def run(*words):
    assert main([*words]) == 0, words
    loaded = HEAVY & set(sys.modules)
    assert not loaded, (words, loaded)

folder = sys.argv[1]
made = ("--workers", "1", "--output")
drawn = f"{folder}/drawn.jsonl"
run("prepare", "maps", "--task", "grid_patch", "--count", "2", *made, drawn)
run("prepare", "phrases", drawn, "--by", "rules", *made, f"{folder}/phrases.jsonl")
run("prepare", "marks", drawn, *made, f"{folder}/marks.jsonl")
run("inspect", drawn, "--output", f"{folder}/page.html")
run("prepare", "adapt", "chat", drawn, *made, f"{folder}/chat.jsonl")
image = json.loads(Path(drawn).read_text().partition("\\n")[0])["images"][0]
coco = {
    "images": [{"id": 1, "file_name": image, "width": 448, "height": 448}],
    "categories": [{"id": 1, "name": "thing"}],
    "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40]}],
}
Path(f"{folder}/coco.json").write_text(json.dumps(coco))
run("prepare", "maps", f"{folder}/coco.json", "--format", "coco", *made, f"{folder}/c.jsonl")
sample = json.loads(Path(f"{folder}/c.jsonl").read_text())
side = 448
sample["regions"][0].pop("box")
sample["regions"][0]["mask"] = {"size": [side, side], "counts": [450, 20, side * side - 470]}
Path(f"{folder}/mask.jsonl").write_text(json.dumps(sample))
engines.engine = lambda settings: lambda image: [OcrWord("word", (1, 2, 30, 12), 0.9, 0)]
words = ("--engine", "tesseract", "--no-rotation")
engines.version = lambda settings: "none"
run("prepare", "words", f"{folder}/drawn_images", *words, *made, f"{folder}/words.jsonl")
Path(f"{folder}/texts.jsonl").write_text('{"text": "one two three"}')
run("prepare", "render", f"{folder}/texts.jsonl", *made, f"{folder}/rendered.jsonl")

assert main(["inspect", f"{folder}/mask.jsonl", "--output", f"{folder}/mask.html"]) == 0
assert not (HEAVY - {"torch"}) & set(sys.modules)  # a mask is a tensor
assert "groundkern.trainer.pictures" not in sys.modules  # which draws with matplotlib
"""


def test_commands_that_need_no_model_import_no_torch(tmp_path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
