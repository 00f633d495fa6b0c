"""`prepare teach`: a teacher's map comes back as the target of its own tokens, and is mass where a
student of other tokens looks for it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from groundkern.hf import GroundingCollator, attach
from groundkern.maps import dequantise
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.prepare.pipeline import write_image
from groundkern.trainer.prepare.sources import Item
from groundkern.trainer.program import main
from groundkern.trainer.teaching import Teach
from tests.hf import videos
from tests.trainer.prepare.records import lines_of

NAME, CELL = "qwen2_5_vl", videos.CELLS["qwen2_5_vl"]
SIZE = (4 * CELL, 3 * CELL)  # 3 rows of 4 tokens


@pytest.fixture(scope="module")
def teacher():
    """The tiny model, attached, and a maker of collators."""
    torch.manual_seed(5)
    model, processor = videos.model(NAME).eval(), videos.processor(NAME)
    attach(model)
    return model, lambda **options: GroundingCollator(processor, model.config, **options)


@pytest.fixture
def root(tmp_path):
    (frame,) = videos.noise(1, SIZE).frames
    frame.save(tmp_path / "a.png")
    Image.new("RGB", SIZE, "red").save(tmp_path / "b.png")
    (tmp_path / "clip").mkdir()
    for i, image in enumerate(videos.noise(4, SIZE).frames):
        image.save(tmp_path / "clip" / f"{i}.png")
    return tmp_path


def record(*, images=("a.png",), clips=(), answers=("the red patch",), **more) -> dict:
    messages = []
    for answer in answers:
        messages.append({"role": "user", "content": "Where is it?"})
        messages.append({"role": "assistant", "content": answer})
    clips = [{"path": clip, "fps": 2} for clip in clips]
    return {"images": list(images), "videos": clips, "messages": messages, **more}


def taught(teacher, root, value, *, layers=None, side=4, rows="answer_predictor", keep=False):
    model, collators = teacher
    layers = layers or list(range(model.config.get_text_config().num_hidden_layers))
    work = Teach(root, "heats", model, collators(map_rows=rows), layers, side, not keep)
    made = work(Item(7, "a:1", value))
    for name, content in made.images.items():
        write_image(root / name, content)
    (sample,) = made.samples
    return sample, parse_sample(sample, root=root, where="a:1").load()


def own_map(teacher, example, rows, layers):
    """Mean over rows and layers of the map that the model has by itself, [C]."""
    model, collators = teacher
    batch = collators(map_rows=rows)([example])
    maps = model(**batch, gk_record=("maps", "layers")).maps[0]
    return maps[batch["gk_map_position"][0] >= 0][:, layers].mean((0, 1)).detach()


@pytest.mark.parametrize(
    ("kind", "rows", "layers"), [("image", "answer_predictor", [0, 1]), ("video", "last", [1])]
)
def test_a_teacher_is_the_target_of_its_own_tokens(teacher, root, kind, rows, layers):
    media = {"images": ()} if kind == "video" else {}
    value = record(**media, clips=["clip"] if kind == "video" else ())
    sample, example = taught(teacher, root, value, rows=rows, layers=layers)
    (region,) = sample["regions"]
    assert region["char_span"] == [0, len("the red patch")]
    assert region["heat"] == "heats/00000007_1_0.npz"
    with np.load(root / region["heat"]) as file:
        steps = file["heat"].shape
        assert steps == ((2, 3, 4) if kind == "video" else (3, 4))
    _, collators = teacher
    batch = collators(map_rows=rows)([example])
    wanted = own_map(teacher, example, rows, layers)
    assert float(wanted.std()) > 1e-4  # it looks somewhere
    for row, position in enumerate(batch["gk_map_position"][0].tolist()):
        if position >= 0:
            found = dequantise(batch["gk_map_target"][0, row])
            torch.testing.assert_close(found, wanted / wanted.sum(), rtol=1e-3, atol=1e-5)


def test_each_answer_and_each_image_has_its_own(teacher, root):
    value = record(images=("a.png", "b.png"), answers=("one", "the other one"))
    sample, example = taught(teacher, root, value)
    assert [(r["turn"], r["image"]) for r in sample["regions"]] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    heats = [region.rasters[0].values for region in example.regions]
    for a in range(4):
        for b in range(a):
            assert not torch.equal(heats[a], heats[b])


def test_a_student_of_other_tokens_gets_the_mass_where_it_is(teacher, root):
    """The same image with half of the pixels across is a student of 3 x 2 tokens: each has the
    mean of two of the teacher's."""
    _, example = taught(teacher, root, record())
    small = example.images[0].resize((SIZE[0] // 2, SIZE[1]))
    _, collators = teacher
    batches = [collators()([e]) for e in (example, replace(example, images=(small,)))]
    wanted, found = (dequantise(batch["gk_map_target"][0, 0]) for batch in batches)
    assert found.shape == (6,)
    halves = wanted.view(3, 2, 2).sum(-1).flatten()
    torch.testing.assert_close(found, halves, rtol=1e-3, atol=1e-5)


def test_samples_with_regions_without_text_or_images_stay(teacher, root):
    own = {"text": "red", "box": [0, 0, 9, 9]}
    for value in (record(regions=[own]), record(images=()), record(answers=(" ",))):
        sample, _ = taught(teacher, root, value, keep=True)
        assert sample == value
    sample, _ = taught(teacher, root, record(regions=[own]))
    assert [list(region) for region in sample["regions"]] == [
        ["char_span", "turn", "image", "heat"]
    ]


def test_the_command(teacher, root, capsys):
    model, collators = teacher
    folder = root / "teacher"
    model.save_pretrained(folder)
    collators().processor.save_pretrained(folder)
    (root / "data.jsonl").write_text(json.dumps(record()) + "\n")
    out = root / "out.jsonl"
    given = ["prepare", "teach", str(root / "data.jsonl"), "--model", str(folder)]
    assert main([*given, "--output", str(out), "--layers", "1", "--side", "8"]) == 0
    (sample,) = lines_of(out)
    assert sample["regions"][0]["heat"] == "out_heats/00000000_1_0.npz"
    with np.load(root / sample["regions"][0]["heat"]) as file:
        assert file["heat"].shape == (6, 8)
    assert "1  heats" in capsys.readouterr().out
