"""Videos in the families that take them: where and when tokens are, and what is read of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.families.seeing import visual_tokens, without_attention
from groundkern.hf import (
    DvSft,
    GroundingCollator,
    IdleImage,
    Klal,
    Region,
    Smam,
    Video,
    attach,
    doctor,
    has_images,
)
from groundkern.hf.data.calling import call, rendered
from groundkern.hf.data.geometry.videos import video_geometry
from tests.hf import videos
from tests.hf.closeness import assert_same_gradients, assert_same_losses, gradients
from tests.hf.naive import naive_forward
from tests.hf.painting import seeded, spots_on
from tests.hf.videos import NAMES, asked, noise
from tests.hf.zoo.test_maps import assert_maps_are_own

PICTURE = Image.effect_noise((100, 60), 80).convert("RGB")
ANSWER = "the red patch"
MOVING = Region(1, 8, 13, 0, video=1, tracks=(((3.0, (0, 0, 0.2, 0.2)), (4.5, (0.8, 0.8, 1, 1))),))
STILL = Region(1, 4, 7, 0, video=0, time=(0.5, 1.5), boxes=((0.1, 0.1, 0.4, 0.4),))


def examples():
    """Videos of two sizes and rates beside an image, a video alone, an image alone, text alone."""
    first, second = noise(4, (120, 90)), noise(4, (60, 90), start=3.0)
    slow = noise(4, (90, 60), step=2.0)
    when = Region(1, 0, 7, 0, video=0, time=(2.0, 6.0))
    return [
        asked((PICTURE,), (first, second), (STILL, MOVING)),
        asked((), (slow,), (when,)),
        asked((PICTURE,), (), (Region(1, 4, 13, 0, boxes=((0.0, 0.0, 0.5, 0.5),)),)),
        asked(),
    ]


def processed(processor, clips: list[Video]) -> tuple[dict, dict]:
    """A sample for each video: what the processor returned, and what the model takes."""
    chat = rendered(processor, asked((), clips[:1]).chat())
    features = call(processor, [()] * len(clips), [chat] * len(clips), [[clip] for clip in clips])
    names = ("input_ids", "mm_token_type_ids", "pixel_values_videos", "video_grid_thw")
    names += ("second_per_grid_ts",)
    return features, {name: torch.as_tensor(features[name]) for name in names if name in features}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "size", [(150, 97), pytest.param((61, 170), marks=pytest.mark.long)], ids=str
)
def test_tokens_change_where_and_when_the_table_says(name, size):
    """A spot on one frame changes the tokens that are there then, and no others."""
    processor, model = videos.processor(name), without_attention(videos.model(name))
    times = (0.0, 0.5, 1.5, 2.0, 4.0)  # two frames to a temporal patch, and one left
    blank = Video((Image.new("RGB", size, "white"),) * len(times), times)
    features, _ = processed(processor, [blank])
    (table,) = video_geometry(processor, model.config, [[blank]], features)
    rects = table[:, 3:] * torch.tensor([*size, *size])
    clips, tokens = [blank], []
    for frame, time in enumerate(times):
        then = ((table[:, 1] <= time) & (time < table[:, 2])).nonzero()[:, 0]
        (token, *_), (spot, *_) = spots_on(rects[then], size, seeded())
        tokens.append((then, int(then[token]), spot))
        images = list(blank.frames)
        images[frame] = images[frame].copy()
        box = (*spot[:2], spot[2] - 1, spot[3] - 1)
        ImageDraw.Draw(images[frame]).rectangle(box, fill="black")
        clips.append(replace(blank, frames=tuple(images)))
    _, batch = processed(processor, clips)
    seen = visual_tokens(model, batch, model.config.video_token_id)
    assert table.shape == (seen.shape[1], 7)
    for (then, token, spot), change in zip(tokens, (seen[1:] - seen[0]).norm(dim=-1)):
        low, high = torch.tensor(spot[:2]), torch.tensor(spot[2:])
        near = ((rects[:, :2] - 3 < high) & (rects[:, 2:] + 3 > low)).all(1)
        near &= torch.isin(torch.arange(len(table)), then)
        assert (change[~near] <= 1e-4 * change.amax()).all(), spot
        assert change[token] > 0.1 * change.amax() > 0, spot


def some(*quick: str) -> list:
    """All families, of which those that are not `quick` are long."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in NAMES]


@pytest.mark.parametrize("name", some("qwen3_vl"))
def test_maps_are_the_models_own_attention(name):
    model = videos.model(name, attention="eager")
    batch = GroundingCollator(videos.processor(name), model.config)(examples())
    assert batch["gk_map_image"].tolist() == [[1, 2], [0, -1], [0, -1], [-1, -1]]
    assert_maps_are_own(model, batch)


@pytest.mark.parametrize("name", some("qwen2_5_vl"))
def test_doctor_passes_and_packed_rows_are_padded_ones(name):
    """Positions of each document are the model's own, with the videos' seconds."""
    model, samples = attach(videos.model(name), klal=Klal(), smam=Smam()), examples()[:2]
    processor = videos.processor(name)
    padded = GroundingCollator(processor, model.config)(samples)
    report = doctor(model, padded)
    assert report.of == "side tokens"
    packing = GroundingCollator(processor, model.config, pack_to=padded["input_ids"].shape[1] + 90)
    packed = packing(samples)
    assert len(packed["input_ids"]) < len(samples)
    assert doctor(model, packed).packed < 1e-5
    model.train()
    losses = [model(**batch).loss for batch in (padded, packed)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert_same_gradients(*(gradients(model, loss) for loss in losses), share=1e-4)
    if "second_per_grid_ts" in packed:  # they are looked at
        other = packed | {"second_per_grid_ts": packed["second_per_grid_ts"] + 1}
        assert not torch.equal(model(**other).loss, losses[1])


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen3_vl"])
def test_losses_are_those_of_the_written_out_forward(name):
    """Side tokens see the visual tokens of their regions' places and times alone."""
    terms = {"smam": Smam(), "dv_sft": DvSft(), "klal": Klal()}
    model = attach(videos.model(name), **terms)
    batch = GroundingCollator(videos.processor(name), model.config)(examples())
    assert_same_losses(model(**batch), naive_forward(model, batch, **terms))


def test_rows_that_are_tokens_of_a_video_are_refused():
    model = attach(videos.model("qwen2_5_vl"), smam=Smam())
    batch = GroundingCollator(videos.processor("qwen2_5_vl"), model.config)(examples()[:1])
    of_video = (batch["input_ids"][0] == model.config.video_token_id).nonzero()[3]
    batch["gk_side_position"] = of_video.expand_as(batch["gk_side_position"]).int()
    for run in (lambda: model(**batch), lambda: doctor(model, batch)):
        with pytest.raises(ValueError, match="rows of text tokens"):
            run()


@pytest.mark.parametrize("pack_to", [pytest.param(None, marks=pytest.mark.long), 200])
def test_an_idle_image_beside_videos_changes_nothing(pack_to):
    processor = videos.processor("qwen2_5_vl")
    model = attach(videos.model("qwen2_5_vl"), klal=Klal(), smam=Smam()).train()
    batch = GroundingCollator(processor, model.config, pack_to=pack_to)(examples()[1::2])
    assert not has_images(batch)
    beside = IdleImage(processor, model.config)(batch)
    losses = [model(**each).loss for each in (batch, beside)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert_same_gradients(*(gradients(model, loss) for loss in losses), share=1e-5)
