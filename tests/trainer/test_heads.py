"""`groundkern heads`: what it measures, how it ranks, its file, its page and its errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern.hf import GroundingCollator, attach, detach
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.heads.entropy import neighbours, spatial_entropy
from groundkern.trainer.heads.measuring import figures_of
from groundkern.trainer.heads.ranking import elbow, ranked
from groundkern.trainer.heads_file import read_heads
from groundkern.trainer.program import main
from groundkern.trainer.visual_places import VisualPlaces
from tests.trainer.tiny_run import config, make_data

BUILT = (2, 2)  # layer and head


def grid(height: int, width: int) -> np.ndarray:
    """[C, 4], cells of an image row by row."""
    y, x = np.divmod(np.arange(height * width), width)
    return np.stack([x / width, y / height, (x + 1) / width, (y + 1) / height], 1)


def test_two_heads_by_hand():
    """Image mass .9, all on the target, and .1, none on it, of four visual tokens and one other."""
    maps = torch.tensor([[[0.5, 0.4, 0.0, 0.0, 9.0], [0.0, 0.0, 0.04, 0.06, 9.0]]])
    target = torch.tensor([True, True, False, False, True])
    own = torch.tensor([True, True, True, True, False])
    found = figures_of(maps, target, own, None)
    np.testing.assert_allclose(found["share"], [[1.0, 0.0]])
    np.testing.assert_allclose(found["hits"], [[1.0, 0.0]])
    np.testing.assert_allclose(found["mass"], [[0.9, 0.1]], rtol=1e-6)
    assert found["chance"] == 0.5
    blind = figures_of(torch.zeros(1, 1, 5), target, own, None)
    assert (blind["share"], blind["hits"]) == (0.0, 0.5)  # its highest tokens are all four


def test_spatial_entropy_by_hand():
    """3 x 3 cells, whose mean is .04 in all maps but the last.

    One cell of .36, or a diagonal pair of .18: one component with all of the mass, 0. Two corners
    of .18 apart: two halves, ln 2. Corners of .27 and .09, above the mean .23 and .05: shares
    .8214 and .1786, .1616 + .3077. Cells apart of .0101 and .0001 over a mean of .0011: above it
    .009 and nothing. An even map has no component.
    """
    rects, still = grid(3, 3), np.full((9, 2), -1.0)
    pairs = neighbours(rects, still)
    assert len(pairs) == 12 + 8  # beside one another and across corners
    maps = np.zeros((6, 9))
    maps[0, 4] = 0.36
    maps[1, [0, 4]] = 0.18
    maps[2, [0, 8]] = 0.18
    maps[3, [0, 8]] = 0.27, 0.09
    maps[4, [0, 8]] = 0.0101, 0.0001
    maps[5] = 0.04
    first, second = 23 / 28, 5 / 28
    uneven = -first * math.log(first) - second * math.log(second)
    wanted = [0.0, 0.0, math.log(2), uneven, 0.0, math.inf]
    np.testing.assert_allclose(spatial_entropy(maps, pairs), wanted, atol=1e-9)
    times = still.copy()
    times[4:] = 1.0  # the diagonal pair is of two frames
    apart = spatial_entropy(maps[1:2], neighbours(rects, times))
    np.testing.assert_allclose(apart, [math.log(2)], atol=1e-9)


def test_entropy_of_a_row_leaves_out_tokens_without_a_place():
    places = VisualPlaces(
        torch.zeros(5), torch.full((5, 2), -1.0), torch.tensor([*grid(2, 2).tolist(), [-1.0] * 4])
    )
    maps = torch.tensor([[[0.5, 0.0, 0.0, 0.0, 0.5]]])
    own = torch.ones(5, dtype=torch.bool)
    found = figures_of(maps, own, own, places)
    assert found["entropy"] == 0.0


def test_ranking_by_hand():
    """Means over two samples of share: .5, .1 and .2, .6."""
    samples = [
        {"share": np.array([[0.4, 0.2], [0.0, 0.6]]), "mass": np.ones((2, 2)), "chance": 0.1},
        {"share": np.array([[0.6, 0.0], [0.4, 0.6]]), "mass": np.ones((2, 2)), "chance": 0.3},
    ]
    found = ranked(samples, (3, 7), "share", 3)
    assert found.chosen == [(7, 1), (3, 0), (7, 0)]  # by the decoder's own numbers
    assert [x.value for x in found.intervals] == pytest.approx([0.6, 0.5, 0.2])
    assert found.chance == pytest.approx(0.2)
    assert ranked(samples, (3, 7), "mass", 4).chosen == [(3, 0), (3, 1), (7, 0), (7, 1)]
    with pytest.raises(ConfigError, match="--top: expected at most 4, the heads that share ranks"):
        ranked(samples, (3, 7), "share", 5)


def test_localisation_heads_by_hand():
    """Sorted mass 0, .1, .1, .1, .9, 1 is farthest from its line 0 to 1 at the third .1 (.5 below
    .6): the elbow is the value .1. Of layers 0, 1 and 2 the last alone counts, and of its heads the
    one with .1 is kept with that of .9."""
    assert elbow(np.array([0.9, 0.0, 0.1, 1.0, 0.1, 0.1])) == pytest.approx(0.1)
    mass = np.array([[0.0, 1.0], [0.1, 0.1], [0.1, 0.9]])
    entropy = np.array([[0.0, 0.0], [0.0, 0.0], [0.5, np.inf]])
    samples = [
        {"share": mass, "mass": mass, "entropy": entropy, "chance": 0.5},
        {"share": mass, "mass": mass, "entropy": entropy[:, ::-1], "chance": 0.5},
        {"share": mass, "mass": mass, "entropy": entropy, "chance": 0.5},
    ]
    found = ranked(samples, (0, 1, 2), "entropy", 2)
    assert found.chosen == [(2, 0), (2, 1)]
    assert [x.value for x in found.intervals] == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(ConfigError, match="at most 2"):
        ranked(samples, (0, 1, 2), "entropy", 3)
    with pytest.raises(ConfigError, match="layers behind the first 2"):
        ranked([{**s, "mass": mass[:2], "share": mass[:2]} for s in samples], (0, 1), "entropy", 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Data, and a model one of whose heads was built to look at the target, whatever the row.

    Its query is a bias in the dimension that RoPE turns least, its key how far a token's hidden
    state lies towards those of the red tokens. The other head on that key is even.
    """
    where = make_data(tmp_path_factory.mktemp("built"))
    model, (layer, head) = tiny_qwen_model(), BUILT
    examples = list(JsonLinesDataset(where / "train.jsonl", root=where))
    batch = GroundingCollator(tiny_qwen_processor(), model.config)(examples)
    attention = model.get_decoder().layers[layer].self_attn
    seen = []
    attention.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        attach(model)(**batch)
        detach(model)
        hidden = seen[0][:, : batch["input_ids"].shape[1]]
        red = torch.zeros(hidden.shape[:2])
        target = batch["gk_map_target"][:, 0] == batch["gk_map_target"][:, 0].amax(1, keepdim=True)
        red.scatter_(1, batch["gk_map_columns"].clamp(min=0).long(), target.float())
        towards = torch.linalg.lstsq(hidden.flatten(0, 1), red.flatten()[:, None]).solution[:, 0]
        size = attention.head_dim
        queries = slice((head // 2) * 2 * size, (head // 2 + 1) * 2 * size)
        keys = slice((head // 2) * size, (head // 2 + 1) * size)
        for linear, part in ((attention.q_proj, queries), (attention.k_proj, keys)):
            linear.weight[part], linear.bias[part] = 0.0, 0.0
        attention.q_proj.bias[head * size + size // 2 - 1] = 100.0
        attention.k_proj.weight[keys.start + size // 2 - 1] = towards
    model.save_pretrained(where / "model")
    return where


def words(where, output, *more: str) -> list[str]:
    """The command line, in fp32 on the CPU."""
    given = ["heads", "--model", where / "model", "--data", where / "test.jsonl"]
    return [*map(str, given), "--output", str(output), "--device", "cpu", *more]


def test_the_head_that_was_built_is_found_first(built, tmp_path, capsys):
    output = tmp_path / "found" / "heads.json"
    assert main(words(built, output, "--top", "3", "--pictures", "1", "--batch-size", "3")) == 0
    printed = capsys.readouterr().out
    assert "3 x 4 heads on 4 samples, by share." in printed
    found = json.loads(output.read_text())
    assert found["heads"][0] == list(BUILT)
    assert found["scores"][0] > 0.9 > 1.5 * found["scores"][1]
    assert read_heads(output) == tuple(map(tuple, found["heads"]))
    shape = {name: np.shape(values) for name, values in found["figures"].items()}
    assert shape == dict.fromkeys(("share", "hits", "mass"), (3, 4))
    assert found["figures"]["hits"][2][2] == 1.0
    settings = {"score": "share", "top": 3, "samples": 4, "seed": 0, "rows": "predictor"}
    assert found["settings"] == settings
    html = output.with_suffix(".html").read_text()
    assert html.count("<title>layer 2, head 2: ") == 3  # of share, hits and mass
    assert html.count('class="chosen"') == 9
    assert html.count("<img ") == 2
    assert "Where is the red patch?" in html


def test_entropy_leaves_the_first_layers_out(built, tmp_path, capsys):
    output = tmp_path / "heads.json"
    assert main(words(built, output, "--top", "1", "--score", "entropy", "--pictures", "0")) == 0
    assert "on the image were left out" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert (found["heads"], found["scores"]) == ([list(BUILT)], [1.0])
    assert 0 < found["elbow"] <= found["figures"]["mass"][2][2]


def test_what_cannot_be_ranked_is_said(built, tmp_path, capsys, monkeypatch):
    output = tmp_path / "heads.json"

    def said(*more: str, status: int, where=output) -> str:
        assert main(words(built, where, *more)) == status
        return capsys.readouterr().err

    assert "--output: expected a file that ends in .json" in said(status=2, where=tmp_path / "x")
    assert "--top: expected at most 12" in said("--top", "13", status=2)
    plain = tmp_path / "plain.jsonl"
    lines = [json.loads(line) for line in (built / "test.jsonl").read_text().splitlines()]
    without = [{k: v for k, v in line.items() if k != "regions"} for line in lines]
    plain.write_text("".join(json.dumps(line) + "\n" for line in without))
    at = ("--data", str(plain), "--root", str(built))
    assert "expected samples with regions, by which heads are ranked, got none among 4" in said(
        *at, status=1
    )
    lines[1]["images"] = ["missing.png"]
    plain.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert said(*at, "--pictures", "0", "--top", "2", status=0) == ""
    assert json.loads(output.read_text())["settings"]["samples"] == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "does not run under torchrun" in said(status=2)


def test_the_config_takes_pairs_or_the_file(tmp_path):
    path = tmp_path / "heads.json"
    head = {"kind": "heads of groundkern", "version": 1}
    path.write_text(json.dumps({**head, "heads": [[2, 1], [0, 3]]}))

    def heads(given) -> tuple:
        made = config(tmp_path, tmp_path / "run", objectives={"klal": {"chosen_heads": given}})
        return made.objectives.klal.chosen_heads

    assert heads([[1, 2]]) == ((1, 2),)
    assert heads(str(path)) == ((2, 1), (0, 3))
    for content, message in (
        ({"heads": [[0, 1]]}, "expected a file of `groundkern heads`"),
        ({**head, "version": 2, "heads": [[0, 1]]}, "expected version 1 of its format, got 2"),
        ({**head, "heads": [[0]]}, "expected `heads`, pairs of a layer and a head"),
        ({**head, "heads": [[0, 1], [0, 1]]}, "expected distinct pairs"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=f"`objectives.klal.*chosen_heads`: .*{message}"):
            heads(str(path))
    with pytest.raises(ConfigError, match=r"no\.json cannot be read"):
        heads(str(tmp_path / "no.json"))
