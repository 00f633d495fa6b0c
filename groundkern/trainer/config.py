"""The settings of a training run: YAML and command line in, one validated `Config` out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from groundkern.hf import objectives as methods
from groundkern.trainer.conflicts import conflicts
from groundkern.trainer.data.videos import RULES
from groundkern.trainer.fields import sentence, told
from groundkern.trainer.heads_file import read_heads
from groundkern.trainer.train_files import TrainFile, TrainFiles, without_forms
from groundkern.trainer.wording import cut

Loc = tuple[str | int, ...]  # a field's path from the root
# Every number has both ends, so that what is infinite, NaN or absurd is refused by its name.
MOST = 10**9
Positive = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0, le=10**15)]


class ConfigError(Exception):
    """A setting that cannot be used; the message is one sentence for the user."""

    def __init__(self, message: str = "") -> None:
        super().__init__(cut(message))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def setting(default: Any = ..., text: str = "") -> Any:
    """A field with the sentence that `--help` shows."""
    return Field(default, description=text)


class Lora(Section):
    r: Annotated[int, Field(gt=0, le=2**16)] = setting(16, "rank")
    alpha: Positive = setting(32, "scale numerator: adapters count alpha / r")
    dropout: Fraction = setting(0.0, "dropout on the adapter input")
    target_modules: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "names of the linear layers that get an adapter",
    )


class Model(Section):
    path: str = setting(text="model folder (or hub name) with its processor")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = setting(
        "sdpa", "attention of the main pass"
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of the weights")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    freeze_vision: bool = setting(False, "train the language model only")
    lora: Lora | None = setting(None, "train LoRA adapters instead of all weights")
    teacher: str | None = setting(None, "model folder (or hub name) of objectives.distill")
    add_tokens: tuple[str, ...] = setting((), "tokens to add, which train under LoRA too")
    image_options: dict[str, Any] = setting(
        {}, "settings of the image processor, such as max_pixels, kept with the trained model"
    )


class Data(Section):
    train: TrainFiles = setting(
        text="training samples: JSON lines (docs/data/data-format.md), or a file of another "
        "program (docs/data/prepare-maps.md, `adapt chat`); or a list of files with weights, "
        "[{path: a.jsonl, "
        "weight: 2}, ...]"
    )
    test: Path | None = setting(None, "held-out samples, likewise")
    root: Path | None = setting(
        None, "folder image paths start from and stay in (null: the folder of the file)"
    )
    image_roots: list[Path] = setting(
        [], "further folders that images of another program's file may be in, by absolute paths"
    )
    boxes: str = setting(
        "auto",
        "boxes in answers of another program's file: auto, none, or a style (docs/data/boxes.md)",
    )
    coord: Literal["pixel", "resized", "unit", "per_mille", "percent", "square"] | None = setting(
        None, "what numbers of these count that do not say so (docs/data/boxes.md)"
    )
    geometry: Literal["auto", "table", "measured"] = setting(
        "auto", "places of visual tokens: the family's table, or measured; auto: a table if any"
    )
    on_bad_sample: Literal["skip", "stop"] = setting("skip", "what a bad sample does to the run")
    max_length: Positive | None = setting(
        None, "tokens a sample may have; text is cut, never images"
    )
    pack_to: Positive | None = setting(
        None,
        "put samples of a batch one behind the other into rows of at most so many tokens; more "
        "than any batch has, such as 1000000000: one row without padding (docs/scale/scale.md)",
    )
    group_by_length: bool = setting(False, "batches of samples of about the same length")
    streaming: bool = setting(
        False,
        "read samples as they come, for data that is not to be indexed: JSON lines or "
        "Parquet; a path may be a folder or a pattern of such files (docs/data/bring-your-data.md)",
    )
    shuffle_buffer: Positive = setting(1000, "samples among which streaming picks the next one")
    max_pixels: Positive = setting(100_000_000, "pixels an image or a frame may have")
    video_fps: Above | None = setting(RULES.fps, "frames taken of a second of a video; null: all")
    video_frames: Positive = setting(RULES.frames, "frames taken of a video at most")
    video_pixels: Positive = setting(RULES.max_pixels, "pixels of all frames taken for a sample")
    video_bytes: Bytes = setting(RULES.max_bytes, "bytes the file of a video may have")
    video_seconds: Above = setting(RULES.max_seconds, "seconds a video may last")
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = setting(
        0.2, "share of the samples that may be bad, with skip, before the run stops"
    )

    @model_validator(mode="after")
    def _rows_hold_samples(self) -> Data:
        if self.pack_to is not None and (self.max_length or 0) > self.pack_to:
            wanted = f"at most `data.pack_to`, which is {self.pack_to}"
            raise ValueError(f"`max_length`: expected {wanted}, got {self.max_length}")
        return self

    @property
    def train_files(self) -> list[TrainFile]:
        """The training files, with their weights and the folders of their images."""
        given = self.train if isinstance(self.train, list) else [TrainFile(path=self.train)]
        return [each.model_copy(update={"root": each.root or self.root}) for each in given]


class Supervision(Section):
    leading_space: bool = setting(True, "label = first token of the word with a leading space")
    max_label_tokens: Positive = setting(3, "drop words of more tokens")
    max_word_patches: Above = setting(3.0, "drop words taller than this many visual tokens")
    max_number_tokens: Positive = setting(
        12, "drop numbers of more tokens (many tokenizers have one for each digit)"
    )
    number_label: Literal["several", "first", "last", "drop"] = setting(
        "several",
        "label of a number such as 1,234.5 or 2nd: all its tokens with digits or letters, weighted "
        "by how many they show, the first or the last of them, or none",
    )
    word_label: Literal["first", "several", "last"] = setting(
        "first",
        "label of any other word: its first token, all that show a letter or digit, as of a number "
        "(and max_number_tokens then goes for it), or the last of these",
    )
    strip_punctuation: bool = setting(
        True, "label a word without the punctuation, signs and currencies around it"
    )
    on_shared_token: Literal["drop", "last", "largest", "several"] = setting(
        "drop", "which word labels a visual token that two words share, or both with `several`"
    )
    byte_fragments: Literal["drop", "keep"] = setting(
        "drop", "words and concepts whose first token is a part of a character"
    )
    allowed_tokens: tuple[str, ...] = setting(
        (), "special tokens that messages may hold, e.g. <|box_start|>; others are refused"
    )
    map_kind: Literal["neighbours", "gaussian", "uniform", "overlap", "evidence", "centre"] = (
        setting("neighbours", "shape of the target map")
    )
    map_sigma: Above = setting(0.8, "of map_kind centre: its bell's width in sides of the region")
    map_floor: Annotated[float, Field(ge=0, le=1)] = setting(
        0.0, "the part of a target map that is spread evenly over its image (EASE: 0.1)"
    )
    map_levels: tuple[NonNegative, NonNegative, NonNegative] = setting(
        (1.0, 0.5, 1e-3), "target map on the target, its neighbours and other visual tokens"
    )
    map_rows: Literal[
        "predictor", "answer_predictor", "phrase_predictor", "last", "answer", "phrase", "anchor"
    ] = setting(
        "predictor",
        "rows with a target map: those that predict the answer's last token, the whole answer or a "
        "region's text, or those tokens' own, or the anchor's own",
    )
    anchor_token: str | None = setting(None, "of map_rows anchor; added if it is not there")
    max_map_rows: Positive | None = setting(None, "map rows of an answer at most (EASE: 64)")
    label_bag: Literal["distinct", "multiset"] = setting(
        "distinct", "labels of an image among which DV-SFT smooths: distinct ones or all"
    )
    empty_region: Literal["skip", "language"] = setting(
        "skip", "an aligned token without a visual token: left out, or shown the language only"
    )
    region_dilation: NonNegative = setting(
        0.0, "visual tokens by which regions grow on all sides for SMAM (target maps do not)"
    )
    lens_outside: NonNegative | None = setting(
        1.0, "logit lens: visual tokens off an object for each on it (null: all)"
    )

    @model_validator(mode="after")
    def _target_is_highest(self) -> Supervision:
        target, *others = self.map_levels
        if target <= 0 or target < max(others):
            wanted = "a level above 0 for the target, and none above it"
            raise ValueError(f"`map_levels`: expected {wanted}, got {list(self.map_levels)}")
        if self.map_rows == "anchor" and not self.anchor_token:
            raise ValueError("`anchor_token`: expected a token beside map_rows anchor, got none")
        return self


def _validated(kind: type) -> type:
    """A dataclass of groundkern, validated by pydantic and described by its docstring's Args.

    Its instances are instances of `kind`, so `groundkern.hf.attach` takes them as they are.
    """
    made = pydantic_dataclass(kind, config=ConfigDict(extra="forbid"), frozen=True)
    for name, text in _described(kind).items():
        made.__pydantic_fields__[name].description = text
    return made


def _described(kind: type) -> dict[str, str]:
    """What a docstring's Args say of each name."""
    args = inspect.getdoc(kind).partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", args, re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in found}


_METHODS = (
    methods.Smam,
    methods.DvSft,
    methods.Klal,
    methods.Hist,
    methods.Margins,
    methods.LogitLens,
    methods.Basic,
    methods.PatchText,
    methods.Distillation,
)
_MADE = map(_validated, _METHODS)
Smam, DvSft, Klal, Hist, Margins, LogitLens, Basic, PatchText, Distillation = _MADE


class Objectives(Section):
    """What is trained beside the text loss: null is off, {} on with the paper's weights."""

    smam: Smam | None = setting(None, "phrase-grounded auxiliary loss (regions)")
    dv_sft: DvSft | None = setting(None, "direct vision supervision (words)")
    klal: Klal | None = setting(None, "attention-map loss (regions)")
    hist: Hist | None = setting(None, "phrase, subject and composition losses (phrases)")
    margins: Margins | None = setting(None, "margins of attention maps (regions)")
    logit_lens: LogitLens | None = setting(None, "concepts at visual tokens (regions)")
    basic: Basic | None = setting(None, "visual tokens against the decoder's first layers (images)")
    patch_text: PatchText | None = setting(None, "words of regions at visual tokens (regions)")
    distill: Distillation | None = setting(None, "attention and tokens of model.teacher")

    @field_validator("klal", mode="before")
    @classmethod
    def _heads_of_file(cls, given: Any) -> Any:
        """The pairs in the file that `chosen_heads` names."""
        path = given.get("chosen_heads") if isinstance(given, dict) else None
        if not isinstance(path, str | Path):
            return given
        try:
            return given | {"chosen_heads": read_heads(Path(path))}
        except ValueError as error:
            raise ValueError(f"`chosen_heads`: {error}") from None


class Training(Section):
    output: Path = setting(text="folder of checkpoints, model, metrics and report")
    steps: Positive | None = setting(None, "optimizer steps (or give epochs)")
    epochs: Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)] | None = setting(
        None, "passes over the training data"
    )
    batch_size: Positive = setting(8, "samples in a forward pass of a process")
    accumulation: Positive = setting(1, "forward passes in an optimizer step")
    learning_rate: Annotated[float, Field(ge=1e-12, le=1, allow_inf_nan=False)] = setting(
        1e-5, "peak learning rate of AdamW"
    )
    warmup: NonNegative = setting(0.03, "warm-up: a fraction of the steps if < 1, else steps")
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = setting(
        "cosine", "learning rate after the warm-up"
    )
    weight_decay: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = setting(
        0.0, "weight decay of AdamW"
    )
    max_grad_norm: NonNegative = setting(1.0, "gradient clipping (0: none)")
    max_nonfinite: Positive = setting(
        3, "steps in a row with a NaN or infinite loss or gradient that end the run"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = setting(
        0, "seed of data order, adapters and dropout"
    )
    bf16: bool = setting(False, "bfloat16 autocast")
    fp16: bool = setting(False, "float16 autocast with a scaled loss (GPU only)")
    workers: Annotated[int, Field(ge=0, le=1024)] = setting(0, "processes that load images")
    save_every: Positive = setting(500, "steps between checkpoints")
    keep: Positive = setting(2, "checkpoints to keep")
    log_every: Positive = setting(10, "steps between log lines")
    term_norms_every: Positive | None = setting(
        None, "steps between gradient norms of each term (a forward and backward each; null: never)"
    )
    report_to: list[str] = setting(
        [], "trackers that get every log line: tensorboard, wandb, mlflow, ... (transformers')"
    )
    strategy: Literal["ddp", "fsdp2", "zero3"] | None = setting(
        None,
        "start `processes` by accelerate launch, which share the weights so (docs/scale/scale.md)",
    )
    processes: Positive | None = setting(
        None, "that `strategy` starts (null: one for each GPU of this machine)"
    )
    context_parallel: Positive = setting(
        1, "processes that share each sequence (docs/scale/scale.md)"
    )
    context_order: Literal["zigzag", "contiguous", "striped"] = setting("zigzag", "who holds which")
    context_engine: Literal["gather", "ring"] = setting("gather", "attention of shared sequences")
    arguments: dict[str, Any] = setting(
        {}, "further arguments of transformers' TrainingArguments, such as optim: adafactor"
    )
    resume: str = setting("auto", "auto: newest checkpoint in output; never; or a checkpoint path")

    @field_validator("arguments")
    @classmethod
    def _known_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        if not given:
            return given
        from groundkern.trainer.arguments import checked  # imports torch

        return checked(given)

    @model_validator(mode="after")
    def _fits_together(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of steps and epochs")
        if self.bf16 and self.fp16:
            raise ValueError("give one of bf16 and fp16")
        return self


class Evaluation(Section):
    samples: Positive | None = setting(256, "held-out samples of each task (null: all)")
    batch_size: Positive = setting(16, "samples in a forward pass")
    heatmaps: Count = setting(4, "pictures of each task in the report")
    every: Positive | None = setting(
        None, "steps between evaluations of the held-out loss while training (null: none)"
    )
    best: str | None = setting(
        None, "held-out figure whose best checkpoint becomes the model: loss, text, map_kl, ..."
    )
    patience: Positive | None = setting(
        None, "evaluations without a better figure that end training (null: never)"
    )
    compare: Path | None = setting(
        None, "output folder of another run, e.g. plain SFT, to show beside this one"
    )


class Config(Section):
    model: Model
    data: Data
    supervision: Supervision = Supervision()
    objectives: Objectives = Objectives()
    training: Training
    evaluation: Evaluation = Evaluation()


def validate(values: dict, *, where: Callable[[Loc], str]) -> Config:
    """`Config` of nested plain values.

    Args:
        values: sections by name, as YAML gives them; a section that is None counts as not given.
        where: a field's path to the start of the error message: file and line, or "command line".

    Raises:
        ConfigError: one sentence that names the field, what was wanted and what was given.
    """
    given = {name: {} for name, field in Config.model_fields.items() if field.is_required()}
    given |= {k: v for k, v in values.items() if v is not None}
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [{**each, "loc": without_forms(each["loc"])} for each in found]
        raise ConfigError(f"{where(told(problems)['loc'])}: {sentence(problems, Config)}") from None
    for name, problem in conflicts(config):
        raise ConfigError(f"{where(tuple(name.split('.')))}: `{name}`: {problem}")
    return config
