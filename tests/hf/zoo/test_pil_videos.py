"""The demo's video processor on PIL against the formula, and against transformers' on torchvision.

The second is skipped where torchvision is not installed (`make families-test`).
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from groundkern.trainer.demo.model import build_model, build_processor, build_tokenizer
from groundkern.trainer.demo.videos import PilVideoProcessor

PIXELS = {"min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28}


def clip(frames: int, height: int, width: int) -> list[Image.Image]:
    random = np.random.default_rng(frames)
    small = random.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return [Image.fromarray(frame).resize((width, height)) for frame in small]


def by_hand(frames: list[Image.Image], *, together: int, patch: int, merge: int) -> Tensor:
    """Patches of frames that need no resizing, token by token, [patches, C n P P]."""
    mean, std = np.array(OPENAI_CLIP_MEAN), np.array(OPENAI_CLIP_STD)
    values = [(np.asarray(frame) / 255 - mean) / std for frame in frames]
    values += values[-1:] * (-len(values) % together)
    height, width, _ = values[0].shape
    side, rows = patch * merge, []
    for start in range(0, len(values), together):
        for top in range(0, height, side):
            for left in range(0, width, side):
                for y in range(top, top + side, patch):
                    for x in range(left, left + side, patch):
                        cut = [v[y : y + patch, x : x + patch] for v in values[start:][:together]]
                        rows.append(np.stack(cut).transpose(3, 0, 1, 2).ravel())
    return torch.tensor(np.stack(rows))


@pytest.mark.parametrize(
    ("frames", "together", "patch"), [(4, 2, 14), (5, 2, 14), (1, 2, 14), (3, 1, 7), (7, 3, 7)]
)
def test_patches_stand_in_the_family_order(frames, together, patch):
    videos = [clip(frames, 56, 84), clip(frames + 1, 84, 56)]
    process = PilVideoProcessor(patch_size=patch, temporal_patch_size=together, **PIXELS)
    made = process(videos, return_metadata=True)
    steps = [-(-len(video) // together) for video in videos]
    rows, columns = 56 // patch, 84 // patch
    assert made["video_grid_thw"].tolist() == [
        [steps[0], rows, columns],
        [steps[1], columns, rows],
    ]
    wanted = [by_hand(video, together=together, patch=patch, merge=2) for video in videos]
    torch.testing.assert_close(
        made["pixel_values_videos"].double(), torch.cat(wanted), rtol=0, atol=1e-6
    )
    assert [m.total_num_frames for m in made["video_metadata"]] == [frames, frames + 1]


def test_frames_are_not_sampled():
    with pytest.raises(ValueError, match="`do_sample_frames`: expected False, got True"):
        PilVideoProcessor(**PIXELS)([clip(2, 56, 56)], do_sample_frames=True)


def test_a_model_takes_what_the_processor_makes_and_it_saves_as_its_family(tmp_path):
    """Placeholders are as many as visual tokens, and seconds are those of the metadata."""
    processor = build_processor(build_tokenizer(["where?"]), videos=True)
    parts = [{"type": "video"}, {"type": "text", "text": "where?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    metadata = [{"total_num_frames": 5, "fps": 4.0, "frames_indices": [0, 1, 2, 3, 4]}]
    batch = processor(
        text=[text],
        videos=[clip(5, 56, 84)],
        video_metadata=metadata,
        do_sample_frames=False,
        return_tensors="pt",
    )
    config = build_model(processor.tokenizer).config
    assert (batch["input_ids"] == config.video_token_id).sum() == 3 * 2 * 3
    assert batch["second_per_grid_ts"].tolist() == [0.5]
    build_model(processor.tokenizer)(**batch)
    processor.save_pretrained(tmp_path)
    saved = (tmp_path / "processor_config.json").read_text(encoding="utf-8")
    assert '"Qwen2_5_VLProcessor"' in saved and '"Qwen2VLVideoProcessor"' in saved


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize(
    ("frames", "height", "width", "within"),
    [(4, 112, 140, 1e-6), (5, 112, 140, 1e-6), (3, 104, 131, 0.05), (6, 30, 30, 0.05)],
)
def test_numbers_are_those_of_the_family(frames, height, width, within):
    """Resized frames differ by two of 255 levels at most, where bicubic sums round otherwise."""
    from transformers import Qwen2VLVideoProcessor

    video = [clip(frames, height, width)]
    own = PilVideoProcessor(**PIXELS)(video)
    family = Qwen2VLVideoProcessor(**PIXELS, cap_pixels_per_frame=False)
    theirs = family(video, do_sample_frames=False, return_tensors="pt")
    assert own["video_grid_thw"].tolist() == theirs["video_grid_thw"].tolist()
    apart = (own["pixel_values_videos"] - theirs["pixel_values_videos"]).abs()
    assert apart.max() < within
    assert apart.mean() < 1e-3
