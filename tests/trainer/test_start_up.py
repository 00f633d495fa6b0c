"""What a command imports before it has something to do: torch and transformers take seconds."""

from __future__ import annotations

import subprocess
import sys

from tests.sources import ROOT

PROGRAM = """
import sys
from trainer.__main__ import main

def run(*words):
    assert main([*words]) == 0, words
    loaded = {"torch", "transformers", "peft", "datasets", "scipy", "openai"} & set(sys.modules)
    assert not loaded, (words, loaded)

folder = sys.argv[1]
made = ("--workers", "1", "--output")
drawn = f"{folder}/drawn.jsonl"
run("prepare", "maps", "--task", "grid_patch", "--count", "2", *made, drawn)
run("prepare", "phrases", drawn, "--by", "rules", *made, f"{folder}/phrases.jsonl")
run("prepare", "marks", drawn, *made, f"{folder}/marks.jsonl")
run("inspect", drawn, "--output", f"{folder}/page.html")
run("prepare", "adapt", "chat", drawn, *made, f"{folder}/chat.jsonl")
"""


def test_commands_that_need_no_model_import_no_torch(tmp_path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
