"""Settings: YAML files and flags; what is accepted means the same when it is written and read."""

from __future__ import annotations

import yaml

from groundkern.trainer.command_line import load_config
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.fields import field_names
from groundkern.trainer.look import parse_box, parse_layers
from groundkern.trainer.prepare.maps.annotated import KNOWN
from groundkern.trainer.prepare.maps.grid import Grid
from groundkern.trainer.prepare.placing import Phrasing
from tests.fuzz.scratch import written
from tests.fuzz.target import Target, expect, sentence

SMALL = b"""\
model: {path: some/model, lora: {r: 8, target_modules: [q_proj, v_proj]}}
data: {train: train.jsonl, test: test.jsonl, max_pixels: 1000000}
objectives: {klal: {}, smam: {}}
supervision: {map_levels: [1.0, 0.5, 0.001], map_kind: overlap, max_word_patches: 2.5}
training: {output: run, steps: 10, batch_size: 2, learning_rate: 1e-4, seed: 3}
"""


def _seeds() -> dict[str, bytes]:
    """Short settings that are accepted; a section that has a wrong name here is left out."""
    found = {}
    sections = yaml.safe_load(SMALL)
    for names in ((), ("model",), ("objectives",), ("supervision",), tuple(sections)):
        kept = {name: sections[name] for name in ("model", "data", "training", *names)}
        found["-".join(names) or "least"] = yaml.safe_dump(kept, sort_keys=False).encode()
    return found


PIECES = (
    *field_names(Config),
    ": ",
    "- ",
    "&a ",
    "*a",
    "<<: *a",
    "!!python/object:os.system",
    "!!int ",
)
PIECES += ("{", "[", "]", "}", "null", "~", "1e-4", ".inf", ".nan", "0o17", "yes", "2001-01-01")
PIECES += ("? ", "|", ">", "---", "...", "%YAML 9", "#", "\n  ", "!!binary |", "!!set {a}", "0x1")


def check_yaml(data: bytes) -> bool:
    """A file's settings are the same when they are written and read again."""
    config = load_config(written("settings/run.yaml", data), [])
    _same(config)
    return True


def _same(config: Config) -> None:
    plain = config.model_dump(mode="json")
    text = yaml.safe_dump(plain, allow_unicode=True)
    again = load_config(written("settings/again.yaml", text.encode()), [])
    expect(again.model_dump(mode="json") == plain, "the same settings when read again", text)


def check_flags(data: bytes) -> bool:
    """Words of a command line, one a line, over a small file."""
    words = data.decode("utf-8", "surrogateescape").split("\n")
    path = written("settings/base.yaml", SEEDS["least"])
    config = load_config(path, [word for word in words if word])
    _same(config)
    return True


def check_options(data: bytes) -> bool:
    """The small languages of options: boxes, layers, grids, texts with values in braces."""
    text = data.decode("utf-8", "surrogateescape")
    taken = 0
    for parse in (_box, _layers, _grid, _phrasing):
        try:
            parse(text)
            taken += 1
        except ConfigError as error:
            sentence(str(error))
    return taken > 0


def _box(text: str) -> None:
    box = parse_box(text, "pixel", (40, 30))
    x0, y0, x1, y1 = box
    expect(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, "a box with an area, inside", box)


def _layers(text: str) -> None:
    layers = parse_layers(text, 24)
    expect(layers == sorted(set(layers)) and set(layers) <= set(range(24)), "layers", layers)
    expect(bool(layers), "a layer", layers)


def _grid(text: str) -> None:
    grid = Grid.of(text, "neighbours")
    expect(grid.height > 0 and grid.width > 0, "a grid with tokens", grid)
    expect(grid.height * grid.width <= 1 << 20, "a grid that fits", grid)


def _phrasing(text: str) -> None:
    phrasing = Phrasing("What?", text).check(KNOWN)
    values = {"label": "a cat", "count": "2", "box": "[1, 2, 3, 4]"}
    answer, (start, stop) = phrasing.filled(values)
    expect(0 <= start <= stop <= len(answer), "a span of the answer", (start, stop), answer)
    expect(answer == text.format_map(values), "the text with its values", answer)


def _flags() -> dict[str, bytes]:
    return {
        "steps": b"--training.steps\n10",
        "list": b"--supervision.map_levels=[1, 0.5, 0.1]",
        "lora": b"--model.lora.r\n8\n--model.lora.target_modules\n[q_proj, v_proj]",
        "null": b"--objectives.smam\nnull",
        "short": b"--on-bad-sample\nskip",
    }


OPTIONS = {
    "box": b"1,2,20,10.5",
    "layers": b"0,8,15-20",
    "grid": b"16x16",
    "answer": b"There are {count} of {label}, {{at}} {box}.",
}
SEEDS = _seeds()
FLAG_PIECES = [f"--{name}" for name in field_names(Config)]
FLAG_PIECES += ["=", "\n", "null", "{", "[1, 2]", "{a: [b", "[" * 100]
OPTION_PIECES = ("{label}", "{box}", "-", "x", "9" * 5000, "1e309", "nan", "0-99999999999")
TARGETS = (
    Target("yaml", check_yaml, SEEDS, "text", PIECES, share=0.3),
    Target("flags", check_flags, _flags(), "text", FLAG_PIECES, share=0.2),
    Target("options", check_options, OPTIONS, "text", OPTION_PIECES, share=2),
)
