"""Hostile settings (issue 17, item 12): names twice, aliases that multiply, depth, length."""

from __future__ import annotations

import time

import pytest

from groundkern.trainer.command_line import load_config, read_yaml
from groundkern.trainer.config import ConfigError
from groundkern.trainer.program import main

REQUIRED = "model: {path: m}\ndata: {train: t}\ntraining: {output: o, steps: 3}\n"


def bomb(levels: int = 40) -> str:
    """Ten times as many values with each level."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def maps(levels: int = 40) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "bomb": (bomb(), "expected settings of at most 10,000 values, aliases written out, got more"),
    "small bomb": (f"{bomb(7)}\n{REQUIRED}", "aliases written out, got more"),
    "bomb in a field": (f"{REQUIRED}objectives:\n  {bomb(9).replace(chr(10), chr(10) + '  ')}",
                        "aliases written out, got more"),
    "bomb of mappings": (maps(), "got more"),
    "inside itself": ("a: &a [*a]", "expected settings without an alias of what it is in"),
    "merged into itself": ("a: &a {<<: *a}", "expected settings without an alias"),
    "deep lists": ("a: " + "[" * 200 + "]" * 200, "levels, got more"),
    "deep mappings": ("{a: " * 100 + "1" + "}" * 100, "levels, got more"),
    "very deep": ("[" * 100_000, "levels, got more"),
    "very deep mappings": ("{a: " * 20_000, "levels, got more"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(300)), "levels, got more"),
    "large": ("a: " + "x" * 300_000, "expected settings of at most 262,144 bytes, got more"),
    "long name": ("x" * 1000 + ": 1", "no such field"),
    "long value": (f"{REQUIRED}evaluation: {'x' * 200_000}", "`evaluation`: expected"),
    "long tag": ("a: !<" + "x" * 200_000 + "> 1", "not valid YAML"),
    "long number": (f"{REQUIRED}evaluation: {{samples: {'9' * 5000}}}", "not valid YAML"),
    "long hexadecimal": (f"{REQUIRED}evaluation: {{heatmaps: -0x{'f' * 9000}}}", "heatmaps"),
    "no date": (f"{REQUIRED}evaluation: {{samples: 2001-99-99}}", "not valid YAML"),
    "a list as a name": ("? [a, b]\n: 1", "not valid YAML"),
    "a number as a name": (f"{REQUIRED}1: 2", "no such field"),
    "several documents": (f"{REQUIRED}---\na: 1", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_12_hostile_yaml_is_one_short_sentence_at_once(what, tmp_path, capsys):
    text, sentence = HOSTILE[what]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    began = time.process_time()
    assert main(["train", "--config", str(path)]) == 2
    assert time.process_time() - began < 10
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}")
    assert sentence in err
    assert err.count("\n") == 1
    assert len(err) < 1200


@pytest.mark.parametrize(
    ("text", "line", "name", "first"),
    [
        (f"{REQUIRED}data: {{train: other}}\n", 4, "data", 2),
        ("model:\n  path: a\n  lora: {r: 1,\n    r: 2}\n", 4, "r", 3),
        ("x: [1, {a: 1, 'a': 2}]\n", 1, "a", 1),
        ("a: &b {c: 1}\nd: {<<: *b, <<: *b}\n", 2, "<<", 2),
    ],
)
def test_12_a_name_twice_is_refused_by_name_with_its_line(tmp_path, text, line, name, first):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, [])
    assert str(error.value) == (
        f"{path}:{line}: `{name}`: expected a name once in a section, got it twice, first in line "
        f"{first}"
    )


def test_aliases_and_merges_are_fine(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"{REQUIRED}supervision: &s {{map_levels: [1.0, 0.5, 0.1]}}\n")
    assert read_yaml(path)[0]["supervision"] == {"map_levels": [1.0, 0.5, 0.1]}
    path.write_text("a: &a {x: 1, z: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(path)[0]["b"] == {"x": 3, "z": 2}
    assert read_yaml(path)[1]["b", "x"] == 2


@pytest.mark.parametrize(
    "word",
    [
        "--objectives.klal.layers=" + "[" * 5000,
        "--objectives.klal={a: &a [x, x], a: 1}",
        "--data=" + "{a: " * 100,
        "--" + "x" * 10**5 + "=1",
        "x" * 10**5,
        "--training.steps=" + "x" * 10**5,
        "--objectives.klal.layers=[" + "x" * 10**5,
    ],
)
def test_12_hostile_words_of_the_command_line(word, capsys):
    required = ["--model.path=m", "--data.train=t", "--training.output=o"]
    assert main(["train", *required, word]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: command line: ")
    assert err.count("\n") == 1
    assert len(err) < 1200
