"""A Qwen2.5-VL of any size with random weights, and one supervised sample of any length."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, FIRST_TEXT = 1, 2, 3, 8
GRID_WIDTH = 32  # visual tokens in a line of the image
REGION = 12  # visual tokens inside a phrase's regions
LEAST = 256  # tokens of the shortest sample


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder, and the vision tower's depth and width."""

    hidden: int
    layers: int
    heads: int
    kv: int
    ffn: int
    vocabulary: int
    vision_depth: int
    vision_width: int
    tied: bool = False


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 512, 1, 32),
    # the head is a third of the decoder, more than in any real one
    "small": Shape(256, 4, 4, 2, 688, 4096, 2, 64),
    "qwen2.5-vl-3b": Shape(2048, 36, 16, 2, 11008, 151936, 32, 1280, tied=True),
    # as large as two processes of a CPU can hold with everything that training needs
    "large": Shape(1024, 8, 16, 4, 2816, 32000, 2, 160),
    "qwen2.5-vl-7b": Shape(3584, 28, 28, 4, 18944, 152064, 32, 1280),
    # the sizes that transformers' Qwen2_5_VLConfig has by itself
    "qwen2.5-vl-72b": Shape(8192, 80, 64, 8, 29568, 152064, 32, 1280),
}


@dataclass(frozen=True)
class Rows:
    """How much of a sample is supervised. text: answer tokens. side: of these, aligned with one of
    `phrases`. word: labelled visual tokens. map: rows with a target map."""

    text: int = 64
    side: int = 32
    phrases: int = 8
    word: int = 128
    map: int = 4

    @property
    def counted(self) -> int:
        """Rows of the output head: of the answer, of word labels, and two of each side token."""
        return self.text + self.word + 2 * self.side

    def visual(self, length: int) -> int:
        """Visual tokens of a sample of `length`: at most three quarters, in whole lines."""
        return min(3 * length // 4, length - self.text - 8) // GRID_WIDTH * GRID_WIDTH


def build(shape: Shape, device: torch.device, dtype: torch.dtype):
    """The model in training mode, without grounding."""
    d = shape.hidden // shape.heads
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv,
            "vocab_size": shape.vocabulary,
            "bos_token_id": None,
            "eos_token_id": None,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [d // 8, 3 * d // 16, d // 2 - d // 8 - 3 * d // 16],
            },
            "tie_word_embeddings": shape.tied,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_width,
            "intermediate_size": 8 * shape.vision_width // 3,
            "num_heads": max(2, shape.vision_width // 80),
            "out_hidden_size": shape.hidden,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.train()


def adapted(model, rank: int):
    """The model with LoRA of that rank on every linear layer of the decoder."""
    from peft import LoraConfig, get_peft_model

    target = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    return get_peft_model(model, LoraConfig(r=rank, target_modules=target))


def sample(shape: Shape, length: int, rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """One sequence of `length` tokens, at most three quarters one image; rows of each kind."""
    if length < LEAST:
        raise ValueError(f"`length`: expected at least {LEAST}, got {length}")
    g = torch.Generator().manual_seed(1)
    visual = rows.visual(length)
    lines = visual // GRID_WIDTH
    ids = torch.randint(FIRST_TEXT, shape.vocabulary, (1, length), generator=g)
    columns = torch.arange(2, 2 + visual)
    ids[0, columns] = IMAGE_TOKEN
    ids[0, 1] = VISION_START
    image = torch.full((1, length), -1)
    image[0, columns] = 0
    answer = torch.arange(
        length - rows.text, length
    )  # trained tokens; the row before predicts each
    inside = torch.zeros(1, rows.phrases, length, dtype=torch.bool)
    for phrase in range(rows.phrases):
        inside[0, phrase, columns[torch.randperm(visual, generator=g)[:REGION]]] = True
    word = columns[torch.randperm(visual, generator=g)[: rows.word].sort().values]
    label = torch.randint(FIRST_TEXT, shape.vocabulary, (1, len(word)), generator=g)
    bag = label.unique()
    target = torch.ones(1, rows.map, visual, dtype=torch.int32)
    target[:, :, :REGION] = 1000
    labels = torch.full_like(ids, -100)
    labels[0, answer] = ids[0, answer]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(4 * visual, 1176, generator=g),
        "image_grid_thw": torch.tensor([[1, 2 * lines, 2 * GRID_WIDTH]]),
        "gk_image": image.int(),
        "gk_text_position": (answer - 1)[None].int(),
        "gk_side_position": (answer - 1)[None, : rows.side].int(),
        "gk_side_set": (torch.arange(rows.side)[None] * rows.phrases // rows.side).int(),
        "gk_side_inside": inside,
        "gk_word_position": word[None].int(),
        "gk_word_label": label,
        "gk_word_bag": bag[None, None],
        "gk_map_position": answer[None, : rows.map].int(),
        "gk_map_token_position": answer[None, : rows.map].int(),
        "gk_map_image": torch.zeros(1, rows.map, dtype=torch.int32),
        "gk_map_target": target,
        "gk_map_columns": columns[None].int(),
    }
    return {name: x.to(device) for name, x in batch.items()}
