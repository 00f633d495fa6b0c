"""What the pages of docs/methods show is a config, and trains what it says."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import yaml

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern import hf
from groundkern.trainer.train import train
from tests.sources import ROOT
from tests.trainer.tiny_run import config, losses, make_data

METHODS = {
    page.name: page.read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs" / "methods").glob("*.md"))
}
RECIPES = {
    f"{name} line {text[: block.start()].count(chr(10)) + 1}": yaml.safe_load(block[1])
    for name, text in METHODS.items()
    for block in re.finditer(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
}
TABLE = METHODS["index.md"].partition("| objective |")[2].partition("\n\n")[0]
PARTS = {  # "| `klal` | `regions` | `map_kl` | ..."
    row[1]: re.findall(r"`(\w+)`", row[2])
    for row in re.finditer(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", TABLE, re.MULTILINE)
    if row[1] != "policy"  # of rollouts, not of files
}
WHOLE = {  # with what the defaults leave out of these parts, or have satisfied
    "margins": {"mean_margin": 1.0, "max_margin": 1.0},
    "patch_text": {"words": 1.0},
    "distill": {"tokens": 0.5},
}
TRAINED = {  # the others turn an objective on as it is, which is a test of its own
    name: recipe for name, recipe in RECIPES.items() if any(recipe["objectives"].values())
}
LAYERS = 36  # as many as the recipes name or pick heads from
OFF = dict.fromkeys(("smam", "dv_sft", "klal"))  # what `config` turns on by itself


def _sections(recipe: dict) -> dict:
    return {**recipe, "objectives": {**OFF, **recipe.get("objectives", {})}}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_a_config(recipe, tmp_path) -> None:
    made = config(tmp_path, tmp_path / "run", **_sections(recipe))
    written = made.model_dump(mode="json")
    for section, fields in recipe.items():
        for name, value in fields.items():
            found = written[section][name]
            values = found if isinstance(found, dict) else {name: found}
            wanted = value if isinstance(value, dict) else {name: value}
            assert {key: values[key] for key in wanted} == wanted


def test_the_pages_have_recipes_and_say_what_is_logged() -> None:
    assert len(RECIPES) >= 16
    trained = {name for recipe in RECIPES.values() for name in recipe["objectives"]}
    assert trained == PARTS.keys() - {"text"}
    assert PARTS["klal"] == ["map_kl"] and len(PARTS) >= 9


def test_the_pages_name_what_attach_takes() -> None:
    found = {
        name: re.findall(r"`attach\(model, (\w+)=(\w+)\(", text) for name, text in METHODS.items()
    }
    pairs = [pair for page in found.values() for pair in page]
    assert len(pairs) >= 9
    for name, objective in pairs:
        inspect.signature(hf.attach).bind(None, **{name: getattr(hf, objective)()})
    options = [
        option
        for text in METHODS.values()
        for option in re.findall(r"`(\w+)=True`\s+for\s+the\s+`GroundingCollator`", text)
    ]
    assert options == ["lens", "contrast"]
    assert set(options) <= inspect.signature(hf.GroundingCollator).parameters.keys()


def _extended(sample: dict) -> dict:
    """With an anchor, with phrases, and with two regions."""
    *context, answer = sample["messages"]
    text = answer["content"]  # "row 0 column 2"
    phrases = [text, *(text[i : i + 5] for i in (0, 6))]
    again = {**sample["regions"][0], "text": "column"}
    return {
        **sample,
        "messages": [*context, {**answer, "content": f"{text}<ANCHOR>"}],
        "phrases": [{"text": phrase, "subject": phrase[:3]} for phrase in phrases],
        "regions": [*sample["regions"], again],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The red squares with all that objectives ask for, a deep model and a teacher."""
    where = make_data(tmp_path_factory.mktemp("recipes"))
    for seed, name in enumerate(("model", "teacher")):
        tiny_qwen_model(seed=seed, num_hidden_layers=LAYERS).save_pretrained(where / name)
    tiny_qwen_processor().save_pretrained(where / "teacher")
    for name in ("train", "test"):
        path = where / f"{name}.jsonl"
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(_extended(sample)) + "\n" for sample in samples))
    return where


def _train(data, output, recipe: dict) -> None:
    """Two steps, each of which has all parts of the recipe's objectives."""
    two = {"training": {"steps": 2, "accumulation": 1}, "evaluation": {"heatmaps": 0}}
    sections = _sections(recipe)
    model = {**sections.pop("model", {}), "path": str(data / "model")}
    train(config(data, output, **sections, **two, model=model))
    parts = [part for name in recipe["objectives"] for part in PARTS[name]]
    rows = losses(output)[:2]
    assert len(rows) == 2 and parts
    for row in rows:
        assert {part: row.get(part) for part in parts if not row.get(part, 0) > 0} == {}


@pytest.mark.long
@pytest.mark.parametrize("recipe", TRAINED.values(), ids=TRAINED)
def test_a_recipe_trains(data, tmp_path, recipe) -> None:
    _train(data, tmp_path / "run", recipe)


@pytest.mark.long
@pytest.mark.parametrize("name", PARTS)
def test_an_objective_trains_all_its_parts(data, tmp_path, name) -> None:
    if name == "text":
        pytest.skip("every run has it")
    model = {"teacher": str(data / "teacher")} if name == "distill" else {}
    _train(data, tmp_path / "run", {"objectives": {name: WHOLE.get(name, {})}, "model": model})
