"""What is run: tasks with what supervises them, methods with their settings, and one run of both.

Every run of a task sees the same drawings, the same number of steps and the same model size; a seed
sets the weights and the order of the data. The settings are the demo's, chosen on the demo's tasks
and not on these.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import durable
from trainer import run_folder as folder
from trainer.config import Config, ConfigError, validate
from trainer.prepare.maps.tasks import TASKS, stream
from trainer.progress import progress

RESULT = "result.json"  # of a run, written last
MADE = "made.json"  # of the data and of the models, written last
TEXTS = 50  # drawings of each task that a tokenizer is trained on
SMAM = {"alpha": 1.0, "gamma": 0.5}  # an untrained model first learns to answer from the region
METHODS: dict[str, dict[str, dict]] = {
    "plain": {},
    "smam": {"smam": SMAM},
    "dv_sft": {"dv_sft": {"weight": 0.5}},  # 0.002 is for a model that can already read
    "klal": {"klal": {}},
    "klal_learned": {"klal": {"average_layers": True, "head_weight": "learned"}},
    "margins": {"margins": {}},
    "logit_lens": {"logit_lens": {"raise_weight": 0.1, "suppress_weight": 0.1}},
    "hist": {"hist": {"maps": "attention"}},
    "hist_gradcam": {"hist": {"maps": "gradcam"}},
    "all": {
        "smam": SMAM,
        "dv_sft": {"weight": 0.5},
        "klal": {},
        "logit_lens": {"raise_weight": 0.1, "suppress_weight": 0.1},
        "hist": {"maps": "attention"},
    },
}
NEEDS = {  # the field of a sample that a method needs
    "smam": "regions",
    "dv_sft": "words",
    "klal": "regions",
    "margins": "regions",
    "logit_lens": "regions",
    "hist": "phrases",
}
FIGURES = (  # metric of `evaluate`, its name in a table
    ("answer_accuracy", "answers right"),
    ("answer_loss", "answer loss"),
    ("peak_in_mask", "contribution peak on target"),
    ("attention_argmax", "attention peak on target"),
    ("attention_mass", "attention on target"),
    ("word_accuracy", "visual labels right"),
)


@dataclass(frozen=True)
class Plan:
    """The settings of an evidence table.

    Args:
        output: folder of data, runs and tables.
        tasks, methods: names of `TASKS` and `METHODS`; "plain" is always among the methods.
        seeds: how many.
        steps, batch_size: of every run.
        samples, test: drawings of each task to train on and to hold out.
        size, difficulty: of the drawings, see `trainer.prepare.maps.tasks`.
    """

    output: Path
    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 3
    steps: int = 400
    batch_size: int = 16
    samples: int = 3200
    test: int = 256
    size: int = 224
    difficulty: str = "easy"

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("methods", METHODS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ConfigError(
                    f"`{name}`: expected some of {', '.join(known)}, got {unknown[0]}"
                )
        for name in ("seeds", "steps", "batch_size", "samples", "test"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"`{name}`: expected a positive number, got {getattr(self, name)}"
                )

    @property
    def drawn(self) -> dict[str, Any]:
        """What the data depends on."""
        keys = ("samples", "test", "size", "difficulty")
        return {"groundkern": folder.versions()["groundkern"], **{k: asdict(self)[k] for k in keys}}

    def pairs(self) -> list[tuple[str, str]]:
        """(task, method) of every method that the task's samples supervise, plain first."""
        methods = ["plain", *(name for name in self.methods if name != "plain")]
        return [(t, m) for t in self.tasks for m in methods if applies(m, fields_of(self, t))]


def applies(method: str, fields: set[str]) -> bool:
    """Whether samples with these fields supervise a method; "all" uses what there is."""
    needed = [NEEDS[name] in fields for name in METHODS[method]]
    return any(needed) if method == "all" else all(needed)


def fields_of(plan: Plan, task: str) -> set[str]:
    """The kinds of supervision that a task's training samples carry."""
    path = plan.output / "data" / task / "train.jsonl"
    with path.open(encoding="utf-8") as lines:
        return {key for line in lines for key, value in json.loads(line).items() if value}


def draw(plan: Plan) -> None:
    """Draw every task's data that is not there yet.

    Raises:
        ConfigError: data of other settings in the way, or a drawing that cannot be made.
    """
    for task in plan.tasks:
        target = plan.output / "data" / task
        if (target / MADE).exists():
            if durable.read_json(target / MADE) != plan.drawn:
                raise ConfigError(f"{target} holds other drawings; choose another --output")
            continue
        (target / "images").mkdir(parents=True, exist_ok=True)
        counts = {"train": plan.samples, "test": plan.test}
        with progress(f"drawing {task}", total=sum(counts.values()), unit="drawing") as bar:
            for split, count in counts.items():
                drawings = stream(
                    task, count=count, split=split, size=plan.size, difficulty=plan.difficulty
                )
                with (target / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
                    for number, (image, sample) in enumerate(drawings):
                        name = f"images/{split}-{number:05d}.png"
                        image.save(target / name)
                        record = {**with_phrases(sample), "images": [name]}
                        lines.write(json.dumps(record) + "\n")
                        bar.update()
        durable.write_json(target / MADE, plan.drawn)


def with_phrases(sample: dict) -> dict:
    """The sample, with phrases if its answer has two parts.

    "row 3 column 5" is made of "row 3" and "column 5", a line of words of its two halves.
    """
    answer = sample["messages"][-1]["content"]
    words, starts, at = answer.split(), [], 0
    for word in words:
        at = answer.index(word, at)
        starts.append(at)
        at += len(word)
    if len(words) < 2 or sample["task"] not in ("grid_patch", "word_page"):
        return sample
    middle = len(words) // 2
    first = [0, starts[middle - 1] + len(words[middle - 1])]
    phrases = [
        {"char_span": [0, len(answer)]},
        {"char_span": first, "subject": words[0]},
        {"char_span": [starts[middle], len(answer)], "subject": words[middle]},
    ]
    return {**sample, "phrases": phrases}


def most_frequent(plan: Plan, task: str) -> float:
    """The share of held-out answers that always saying the most frequent one gets right."""
    answers = Counter()
    path = plan.output / "data" / task / "test.jsonl"
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            answers[json.loads(line)["messages"][-1]["content"]] += 1
    return max(answers.values()) / answers.total()


def make_models(plan: Plan) -> None:
    """One untrained model for each seed, with a tokenizer of all the tasks' texts.

    Raises:
        ConfigError: models of other settings in the way.
    """
    from trainer.demo.generate import corpus
    from trainer.demo.model import save_model

    texts: list[str] = []
    for seed in range(plan.seeds):
        target = plan.output / "data" / f"model-{seed}"
        made = {"seed": seed, **{k: plan.drawn[k] for k in ("groundkern", "size", "difficulty")}}
        if (target / MADE).exists():
            if durable.read_json(target / MADE) != made:
                raise ConfigError(f"{target} was made for other settings; choose another --output")
            continue
        texts = texts or [*corpus(), *_texts(plan)]
        save_model(target, texts, seed=seed)
        durable.write_json(target / MADE, made)


def _texts(plan: Plan) -> list[str]:
    """Questions and answers of every task, whichever are run."""
    texts = []
    for task in TASKS:
        for _, sample in stream(
            task, count=TEXTS, seed=1, size=plan.size, difficulty=plan.difficulty
        ):
            user, assistant = (message["content"] for message in sample["messages"])
            texts += [user[-1]["text"], assistant]
    return texts


def run_config(plan: Plan, task: str, method: str, seed: int) -> Config:
    """The settings of one run."""
    data, fields = plan.output / "data", fields_of(plan, task)
    objectives = METHODS[method]
    gradcam = any(options.get("maps") == "gradcam" for options in objectives.values())
    values = {
        "model": {
            "path": str(data / f"model-{seed}"),
            "attn_implementation": "eager" if gradcam else "sdpa",
        },
        "data": {
            "train": str(data / task / "train.jsonl"),
            "test": str(data / task / "test.jsonl"),
            "on_bad_sample": "stop",
        },
        "supervision": {"map_levels": (1.0, 0.1, 1e-3)},  # a target is a few visual tokens
        "objectives": {k: v for k, v in objectives.items() if NEEDS[k] in fields},
        "training": {
            "output": str(plan.output / "runs" / task / method / str(seed)),
            "steps": plan.steps,
            "batch_size": plan.batch_size,
            "learning_rate": 1e-3,
            "warmup": 20,
            "weight_decay": 0.01,
            "seed": seed,
            "save_every": max(100, plan.steps // 4),
            "keep": 1,
        },
        "evaluation": {"samples": plan.test, "batch_size": 32, "heatmaps": 1},
    }
    return validate(values, where=lambda loc: f"{task}, {method}, seed {seed}")


def run(plan: Plan, task: str, method: str, seed: int) -> dict[str, Any]:
    """The held-out figures of one run, which is trained, continued, or read if it is done.

    Raises:
        ConfigError: a result of other settings in the way.
        Stopped: Ctrl-C or SIGTERM; the same command continues.
    """
    config = run_config(plan, task, method, seed)
    output = config.training.output
    settings = {"config": config.model_dump(mode="json"), "drawn": plan.drawn}
    if (output / RESULT).exists():
        found = durable.read_json(output / RESULT)
        if found["settings"] != settings:
            raise ConfigError(f"{output} holds a run of other settings; choose another --output")
        return found
    from trainer.train import train

    train(config, before=_before(plan, task, seed))
    after = durable.read_json(output / folder.AFTER)
    (figures,) = after["tasks"].values()
    record = durable.read_json(output / folder.RECORD)
    result = {
        "task": task,
        "method": method,
        "seed": seed,
        "figures": figures,
        "seconds": record["seconds"],
        "settings": settings,
    }
    durable.write_json(output / RESULT, result)
    for path in (*output.glob("checkpoint-*"), output / folder.MODEL):  # of 80 runs they add up
        shutil.rmtree(path, ignore_errors=True)
    return result


def _before(plan: Plan, task: str, seed: int) -> dict | None:
    """The untrained model's figures, from the plain run of the same task and seed."""
    path = plan.output / "runs" / task / "plain" / str(seed) / folder.BEFORE
    return durable.read_json(path) if path.exists() else None
