"""The settings of a training run: YAML and command line in, one validated `Config` out."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class ConfigError(Exception):
    """A setting that cannot be used; the message is one sentence for the user."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def setting(default: Any = ..., text: str = "") -> Any:
    """A field with the sentence that `--help` shows."""
    return Field(default, description=text)


class Lora(Section):
    r: Positive = setting(16, "rank")
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


class Data(Section):
    train: Path = setting(text="JSON-lines file of training samples")
    test: Path | None = setting(None, "JSON-lines file of held-out samples")
    root: Path | None = setting(
        None, "folder image paths start from and stay in (null: the folder of the file)"
    )
    on_bad_sample: Literal["skip", "stop"] = setting("skip", "what a bad sample does to the run")
    max_length: Positive | None = setting(
        None, "tokens a sample may have; text is cut, never images"
    )
    max_pixels: Positive = setting(100_000_000, "pixels an image may have")


class Supervision(Section):
    leading_space: bool = setting(True, "label = first token of the word with a leading space")
    max_label_tokens: Positive = setting(3, "drop words of more tokens")
    max_word_patches: Annotated[float, Field(gt=0)] = setting(
        3.0, "drop words taller than this many visual tokens"
    )
    on_shared_token: Literal["drop", "last", "largest"] = setting(
        "drop", "which word labels a visual token that two words share"
    )
    map_kind: Literal["neighbours", "gaussian", "uniform", "overlap"] = setting(
        "neighbours", "shape of the target map"
    )
    map_levels: tuple[NonNegative, NonNegative, NonNegative] = setting(
        (1.0, 0.5, 1e-3), "target map on the target, its neighbours and other visual tokens"
    )
    map_rows: Literal["last", "predictor", "answer", "phrase"] = setting(
        "last", "rows with a target map: the answer's last token, the row before it, or all"
    )
    label_bag: Literal["distinct", "multiset"] = setting(
        "distinct", "labels of an image among which DV-SFT smooths: distinct ones or all"
    )
    empty_region: Literal["skip", "language"] = setting(
        "skip", "an aligned token without a visual token: left out, or shown the language only"
    )
    lens_outside: NonNegative | None = setting(
        1.0, "logit lens: visual tokens off an object for each on it (null: all)"
    )


class Smam(Section):
    weight: NonNegative = setting(1.0, "weight of the whole auxiliary term")
    beta: NonNegative = setting(0.1, "slope of the grounding loss (S4)")
    alpha: NonNegative = setting(0.1, "weight of the masked cross entropy (S5)")
    gamma: NonNegative = setting(2.0, "weight of the grounding loss (S5)")
    detach_reference: bool = setting(False, "no gradient through the masked pass in (S4)")
    divide_by: Literal["text", "aligned"] = setting(
        "text", "divide the sum of (S5) by the answer tokens or by the aligned ones"
    )


class DvSft(Section):
    weight: NonNegative = setting(2e-3, "lambda of (D4)")
    smoothing: Fraction = setting(0.3, "b of (D3), spread over the image's other labels")
    average: Literal["labelled", "visual", "image"] = setting(
        "labelled", "mean over labelled visual tokens, over all, or image by image"
    )


class Klal(Section):
    weight: NonNegative = setting(1.0, "lambda of (K4)")
    over: Literal["columns", "renormalised", "visible"] = setting(
        "columns", "normalise over the visual tokens (before or after the head mean) or all keys"
    )
    heads: Literal["mean", "each"] = setting("mean", "KL of the head mean or mean KL of the heads")
    layers: tuple[int, ...] | None = setting(None, "supervised layers (null: all)")
    divergence: Literal["kl", "reverse_kl", "js"] = setting(
        "kl", "KL(target || map), its reverse, or Jensen-Shannon"
    )
    average_layers: bool = setting(False, "one loss on the map averaged over layers")
    head_weight: Literal["uniform", "learned"] = setting(
        "uniform", "weights of the heads: equal, or one learned parameter"
    )


class Hist(Section):
    phrase: NonNegative = setting(1.0, "weight of (H1), the phrases' tokens")
    subject: NonNegative = setting(1.0, "weight of (H2), the subjects' tokens")
    composition: NonNegative = setting(1.0, "weight of (H3), composites against their parts")
    maps: Literal["attention", "gradcam"] = setting(
        "attention", "maps of (H3); gradcam needs model.attn_implementation eager"
    )
    over: Literal["columns", "visible"] = setting(
        "columns", "normalise attention over the visual tokens or over all visible keys"
    )
    distance: Literal["l2", "l1", "smooth_l1", "kl"] = setting("l2", "distance of maps in (H3)")
    detach_parts: bool = setting(False, "only the composite's map learns in (H3)")
    layers: tuple[int, ...] | None = setting(None, "layers whose maps are averaged (null: all)")


class Margins(Section):
    weight: NonNegative = setting(1.0, "weight of both margins")
    mean_margin: NonNegative = setting(0.1, "margin between the means inside and outside (A1)")
    max_margin: NonNegative = setting(0.5, "margin between the maxima inside and outside (A2)")
    maps: Literal["attention", "gradcam"] = setting(
        "attention", "maps; gradcam needs model.attn_implementation eager"
    )
    scale: Literal["max", "sum"] = setting("max", "what a map is divided by")
    inside: Annotated[float, Field(gt=0, le=1)] = setting(
        0.75, "inside: at least this share of the target map's maximum"
    )
    layers: tuple[int, ...] | None = setting(None, "layers whose maps are averaged (null: all)")


class LogitLens(Section):
    raise_weight: NonNegative = setting(1.0, "weight of (L1), tokens on a concept's object")
    suppress_weight: NonNegative = setting(1.0, "weight of (L2), tokens off it")


class Objectives(Section):
    smam: Smam | None = setting(None, "phrase-grounded auxiliary loss (regions)")
    dv_sft: DvSft | None = setting(None, "direct vision supervision (words)")
    klal: Klal | None = setting(None, "attention-map loss (regions)")
    hist: Hist | None = setting(None, "phrase, subject and composition losses (phrases)")
    margins: Margins | None = setting(None, "margins of attention maps (regions)")
    logit_lens: LogitLens | None = setting(None, "concepts at visual tokens (regions)")


class Training(Section):
    output: Path = setting(text="folder of checkpoints, model, metrics and report")
    steps: Positive | None = setting(None, "optimizer steps (or give epochs)")
    epochs: Annotated[float, Field(gt=0)] | None = setting(None, "passes over the training data")
    batch_size: Positive = setting(8, "samples in a forward pass")
    accumulation: Positive = setting(1, "forward passes in an optimizer step")
    learning_rate: Annotated[float, Field(gt=0)] = setting(1e-5, "peak learning rate of AdamW")
    warmup: NonNegative = setting(0.03, "warm-up: a fraction of the steps if < 1, else steps")
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = setting(
        "cosine", "learning rate after the warm-up"
    )
    weight_decay: NonNegative = setting(0.0, "weight decay of AdamW")
    max_grad_norm: NonNegative = setting(1.0, "gradient clipping (0: none)")
    seed: int = setting(0, "seed of data order, adapters and dropout")
    bf16: bool = setting(False, "bfloat16 autocast")
    workers: Annotated[int, Field(ge=0)] = setting(0, "processes that load images")
    save_every: Positive = setting(500, "steps between checkpoints")
    keep: Positive = setting(2, "checkpoints to keep")
    log_every: Positive = setting(10, "steps between log lines")
    resume: str = setting("auto", "auto: newest checkpoint in output; never; or a checkpoint path")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of steps and epochs")
        return self


class Evaluation(Section):
    samples: Positive | None = setting(256, "held-out samples of each task (null: all)")
    batch_size: Positive = setting(16, "samples in a forward pass")
    heatmaps: Annotated[int, Field(ge=0)] = setting(4, "pictures of each task in the report")
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


def validate(values: dict, *, source: str) -> Config:
    """`Config` of nested plain values.

    Args:
        values: sections by name, as YAML gives them.
        source: what starts the error message: a file name or "command line".

    Raises:
        ConfigError: one sentence that names the field, what was wanted and what was given.
    """
    required = {name: {} for name, field in Config.model_fields.items() if field.is_required()}
    try:
        return Config.model_validate(required | {k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise ConfigError(f"{source}: {_sentence(error)}") from None


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file, loaded safely."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(values).__name__}")
    return values


def walk_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, pydantic field) of every field and section, in declaration order."""
    for key, field in section.model_fields.items():
        yield prefix + key, field
        inner = section_of(field)
        if inner is not None:
            yield from walk_fields(inner, f"{prefix}{key}.")


def section_of(field: Any) -> type[Section] | None:
    """The `Section` class that a field holds, if it holds one."""
    kinds = (kind for kind in members(field.annotation) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, Section)), None)


def members(annotation: Any) -> tuple:
    """The alternatives of an annotation: `int | None` gives (int, NoneType)."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for part in get_args(annotation) for kind in members(part))
    return (annotation,)


def unknown_field(name: str) -> str:
    """The sentence about a name that is no field, with the closest one that is."""
    known = [known for known, _ in walk_fields()]
    same_end = [other for other in known if other.endswith("." + name.rpartition(".")[2])]
    cutoff = 0.0 if same_end else 0.5
    close = difflib.get_close_matches(name, same_end or known, n=1, cutoff=cutoff)
    hint = f"did you mean `{close[0]}`?" if close else "--help lists all fields"
    return f"`{name}`: no such field; {hint}"


def differences(old: Config, new: Config, *, ignore: tuple[str, ...]) -> list[str]:
    """`name: old -> new` of the fields that differ; `ignore` holds beginnings of names."""
    left, right = (_flat(config.model_dump(mode="json")) for config in (old, new))
    return [
        f"{name}: {show(left.get(name))} -> {show(right.get(name))}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name) and not name.startswith(ignore)
    ]


def show(value: Any) -> str:
    """A value as it is written in YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _sentence(error: ValidationError) -> str:
    problems = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")
    missing = [f"`{_name(problem)}`" for problem in problems if problem["type"] == "missing"]
    first, name = problems[0], _name(problems[0])
    match first["type"]:
        case "missing":
            return f"{', '.join(missing)}: required, but not given"
        case "extra_forbidden":
            text = unknown_field(name)
        case "value_error":
            text = f"`{name}`: {first['msg'].removeprefix('Value error, ')}"
        case _:
            wanted = first["msg"].removeprefix("Input should be ").split(", unable")[0]
            text = f"`{name}`: expected {wanted}, got {first['input']!r}"
    return text if len(problems) == 1 else f"{text} (and {len(problems) - 1} more)"


def _name(problem: dict) -> str:
    return ".".join(str(part) for part in problem["loc"])


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat.update(_flat(value, f"{prefix}{key}.") if inner else {prefix + key: value})
    return flat
