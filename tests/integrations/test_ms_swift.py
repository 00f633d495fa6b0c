"""ms-swift's own runs on a tiny Qwen2.5-VL with Qwen's vocabulary: `make integrations`."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("swift.pipelines", reason="ms-swift is not installed: `make integrations`")

from PIL import Image
from swift.pipelines import sft_main
from swift.trainers.trainer_factory import TrainerFactory
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import GroundedExample, GroundingCollator, attach
from groundkern.integrations import ms_swift
from groundkern.integrations.ms_swift import swift_encoding, swift_trainer
from groundkern.integrations.shared.settings import read_settings
from groundkern.trainer.prepare.adapt.chat.turns import Turn
from tests.hf.collating import make_region
from tests.integrations.programs import (
    BOX,
    SIZES,
    save_images,
    save_tiny_with_qwens_tokens,
    shown,
    write_lines,
)

ON = {"objectives": {"klal": {}, "smam": {}}}
OWN = "swift.trainers.Seq2SeqTrainer"
REF = "<|object_ref_start|>red patch<|object_ref_end|>"
WRITTEN = f"The {REF} is at <|box_start|>(28,28),(84,56)<|box_end|>, in row 2."
TAGS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its two samples in ms-swift's grounding format, and other files of them."""
    made = tmp_path_factory.mktemp("ms_swift")
    save_tiny_with_qwens_tokens(made / "model")
    images = save_images(made)
    first = {
        "messages": _chat("Where is the <ref-object>?", "The <ref-object> is at <bbox>, in row 2."),
        "images": images[:1],
    }
    objects = {"ref": ["red patch"] * 2, "bbox": [list(BOX)]}
    second = {"messages": _chat("Read the word.", "A total."), "images": images[1:]}
    columns = {
        "messages": _chat("Where?", "The red patch."),
        "images": images[:1],
        "regions": [{"text": "red patch", "box": list(BOX)}],
    }
    (x0, y0, x1, y1), (w, h) = BOX, SIZES[0]
    unit = [[x0 / w, y0 / h, x1 / w, y1 / h]]
    norm = {**first, "objects": {**objects, "bbox": unit, "bbox_type": "norm1"}}
    thousand = {**first, "objects": {**objects, "bbox_type": "norm1000"}}
    text = {"messages": _chat("Say it.", "A total."), "images": [], "regions": []}
    text["messages"][0]["content"] = "Say it."
    files = {
        "objects": [{**first, "objects": objects}, second],
        "plain": [second, second],
        "columns": [columns],
        "norm": [norm],
        "thousand": [thousand],
        "mixed": [text, columns],
    }
    for name, samples in files.items():
        write_lines(made / f"{name}.jsonl", samples)
    return made


def _chat(question, answer):
    return [
        {"role": "user", "content": f"<image>{question}"},
        {"role": "assistant", "content": answer},
    ]


@pytest.fixture(autouse=True)
def as_it_was():
    """Every test begins with ms-swift's own trainer."""
    yield
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = OWN


def run(folder, output, *more, data="objects", settings=ON, steps=2):
    """`swift sft` of two samples a step, with a plugin file as a user writes it; None: without."""
    options = {
        "model": folder / "model",
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "dataset": folder / f"{data}.jsonl",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "freeze_vit": "false",
        "freeze_aligner": "false",
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "warmup_ratio": 0,
        "weight_decay": 0,
        "max_length": 512,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "split_dataset_ratio": 0,
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "load_from_cache_file": "false",
        "dataloader_num_workers": 0,
        "gradient_checkpointing": "false",
        "add_version": "false",
        "check_model": "false",
        "strict": "true",
        "output_dir": output,
    }
    if settings is not None:
        plugin = output.with_suffix(".py")
        plugin.write_text(
            f"from groundkern.integrations.ms_swift import register\nregister(**{settings!r})\n"
        )
        options["external_plugins"] = plugin
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    sft_main([*words, *more])
    lines = map(json.loads, (output / "logging.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


@pytest.fixture
def batches(monkeypatch):
    """The batches that a run makes."""
    kept, own = [], swift_trainer.GroundingBatches.__call__

    def call(self, samples):
        kept.append(own(self, samples))
        return dict(kept[-1])

    monkeypatch.setattr(swift_trainer.GroundingBatches, "__call__", call)
    return kept


def inside_of(batch, b=0):
    """Which visual tokens are inside any set of a sample."""
    columns = batch["gk_map_columns"][b]
    columns = columns[columns >= 0].long()
    return batch["gk_side_inside"][b].any(0)[columns].nonzero()[:, 0].tolist()


def examples_of(folder):
    """The same samples with their texts as the template writes them."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    box = tuple(v / s for v, s in zip(BOX, 2 * SIZES[0]))
    regions = tuple(make_region(WRITTEN, text, turn=2, boxes=(box,)) for text in ("28,28),(84,56",))
    made = []
    for number, (question, answer) in enumerate(
        ((f"Where is the {REF}?", WRITTEN), ("Read the word.", "A total."))
    ):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [system, {"role": "user", "content": content}]
        chat.append({"role": "assistant", "content": answer})
        image = Image.open(folder / f"{number}.png")
        made.append(GroundedExample((image,), chat, regions if number == 0 else ()))
    return made


def test_a_run_is_that_of_our_trainer(folder, tmp_path, batches):
    """Same tokens, same rows, same losses and gradients."""
    theirs = run(folder, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    examples = examples_of(folder)
    wanted = GroundingCollator(processor, model.config, allowed_tokens=TAGS)(examples)
    for name, x in wanted.items():
        if name in ("gk_text_position", "labels"):  # ours leaves the last line break out
            continue
        torch.testing.assert_close(batches[0][name], x, rtol=0, atol=0, msg=name)
    for row, labels in zip(batches[0]["gk_text_position"], batches[0]["labels"]):
        assert row[row >= 0].tolist() == ((labels != -100).nonzero()[:, 0] - 1).tolist()

    # ms-swift changes transformers' Trainer for its process, so that ours cannot run beside it
    attach(model.train(), **read_settings(ON, "test").attached)
    given = {n: x for n, x in batches[0].items() if n not in swift_trainer.NOT_OF_MODEL}
    output = model(**given)
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    ours = {"loss": output.loss, "grad_norm": norm, **output.parts}
    assert ours.keys() >= {"text", "map_kl", "smam_grounding", "smam_cross_entropy"}
    for name, value in ours.items():
        assert theirs[0][name] == pytest.approx(value.item(), rel=1e-4), name


def test_without_objectives_it_is_ms_swifts_run(folder, tmp_path):
    plain = run(folder, tmp_path / "plain", settings=None)
    off = run(folder, tmp_path / "off", settings={})
    assert len(plain) == 2 and plain[0]["loss"] > plain[1]["loss"]
    for line, found in zip(plain, off, strict=True):
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(line[name], rel=1e-4), name


def test_the_supervised_tokens_are_the_box(folder, tmp_path, batches):
    run(folder, tmp_path / "out", steps=1)
    processor = AutoProcessor.from_pretrained(folder / "model")
    text = shown(processor, batches[0], 0, batches[0]["gk_side_position"])
    assert text == "28,28),(84,56"
    assert inside_of(batches[0]) == [6, 7]  # of 4 rows of 5


def test_a_reference_before_its_box_is_tied_without_special_tokens():
    text = "The <ref-object><bbox> of <ref-object>"
    written = "<|box_start|>(28,28),(84,56)<|box_end|>"
    other = "<|object_ref_start|>a page<|object_ref_end|>"
    seen = SimpleNamespace(sizes=[SIZES[0]], refs=[REF, other], boxes=[written])
    objects = {"ref": ["red patch", "a page"], "bbox": [list(BOX)]}
    turns, regions = swift_encoding._with_objects([Turn("assistant", (text,))], objects, seen)
    answer = "".join(turns[0].pieces)
    assert answer == f"The {REF}{written} of {other}"
    tied = [answer[slice(*region["char_span"])] for region in regions]
    assert tied == ["red patch", "28,28),(84,56"]  # the page has no box
    assert all(region["box"] == list(BOX) for region in regions)


def test_a_message_that_is_no_text_is_refused():
    """It would shift the turns of the others."""
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": [1, 2]}]
    with pytest.raises(ValueError, match=r"`messages\[1\].content`: expected a text, got list"):
        swift_encoding._record(None, messages, {}, SimpleNamespace(images=[]), None)


def test_boxes_as_fractions_and_regions_of_columns(folder, tmp_path, batches):
    run(folder, tmp_path / "norm", data="norm", steps=1)
    more = ("--remove_unused_columns", "false")
    run(folder, tmp_path / "columns", *more, data="columns", steps=1)
    assert inside_of(batches[0]) == inside_of(batches[-1]) == [6, 7]
    processor = AutoProcessor.from_pretrained(folder / "model")
    text = shown(processor, batches[-1], 0, batches[-1]["gk_side_position"])
    assert text.strip() == "red patch"


def test_geometry_is_that_of_resized_images(folder, tmp_path, batches, monkeypatch):
    """`MAX_PIXELS` of Qwen's own resizing; boxes stay those of the whole image."""
    from qwen_vl_utils import vision_process

    monkeypatch.setattr(vision_process, "IMAGE_MAX_TOKEN_NUM", 6)
    run(folder, tmp_path / "out", data="norm", steps=1)
    rows, cols = (n // 2 for n in batches[0]["image_grid_thw"][0].tolist()[1:])
    assert rows * cols == int((batches[0]["gk_image"][0] >= 0).sum()) <= 6
    x0, y0, x1, y1 = (v / s for v, s in zip(BOX, 2 * SIZES[0]))
    wanted = [
        row * cols + col
        for row in range(rows)
        for col in range(cols)
        if x0 < (col + 1) / cols and col / cols < x1 and y0 < (row + 1) / rows and row / rows < y1
    ]
    assert inside_of(batches[0]) == wanted


def test_a_sample_of_text_beside_one_with_an_image(folder, tmp_path, batches):
    run(folder, tmp_path / "out", "--remove_unused_columns", "false", data="mixed", steps=1)
    batch, processor = batches[0], AutoProcessor.from_pretrained(folder / "model")
    assert (batch["gk_image"][0] < 0).all() and (batch["gk_image"][1] >= 0).sum() == 20
    assert (batch["gk_side_position"][0] < 0).all()
    assert shown(processor, batch, 1, batch["gk_side_position"]).strip() == "red patch"


def test_accumulation_changes_nothing(folder, tmp_path):
    """One sample has all regions: a mean of micro-batches' means would be half as much."""
    whole = run(folder, tmp_path / "whole")
    cut = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")
    for line, found in zip(whole, run(folder, tmp_path / "cut", *cut), strict=True):
        for name in ("loss", "grad_norm", "text", "map_kl", "smam_grounding"):
            assert found[name] == pytest.approx(line[name], rel=2e-4), name


def test_adapters_evaluations_and_a_run_that_goes_on(folder, tmp_path):
    klal = {"objectives": {"klal": {"head_weight": "learned"}}}
    more = ["--tuner_type", "lora", "--lora_dropout", "0", "--lr_scheduler_type", "constant"]
    more += ["--val_dataset", str(folder / "objects.jsonl")]
    for what in ("eval", "save"):
        more += [f"--{what}_strategy", "steps", f"--{what}_steps", "1"]
    whole = run(folder, tmp_path / "out", *more, settings=klal)
    lines = map(json.loads, (tmp_path / "out" / "logging.jsonl").read_text().splitlines())
    first, second = (line for line in lines if "eval_loss" in line)
    assert first["eval_map_kl"] > 0 and first["eval_loss"] != second["eval_loss"]
    kept = tmp_path / "out" / "checkpoint-1"
    assert (kept / "groundkern_trained.safetensors").exists()
    on = run(folder, tmp_path / "on", *more, "--resume_from_checkpoint", str(kept), settings=klal)
    for name in ("loss", "grad_norm", "map_kl"):
        assert on[-1][name] == pytest.approx(whole[1][name], rel=1e-4), name


def test_a_run_without_regions_says_so(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`objectives.smam`: expected samples with regions"):
        run(folder, tmp_path / "out", data="plain")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--enable_dft_loss", "true"), "`enable_dft_loss`: expected it off"),
        (("--enable_channel_loss", "true"), "`enable_channel_loss`"),
        (("--loss_type", "cross_entropy"), "`loss_type`"),
        (("--use_logits_to_keep", "true"), "`use_logits_to_keep`"),
        (("--loss_scale", "react"), "`loss_scale`: expected weights of 0 and 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, tmp_path, more, said):
    with pytest.raises(Exception, match=said):
        run(folder, tmp_path / "out", *more)


def test_what_needs_other_packages_is_refused_by_name():
    """flash-attn, unsloth and several processes, which are not here: by the trainer's own check."""
    off = dict.fromkeys(swift_trainer.OFF["args"])
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    others = {"tuner_backend": "unsloth", "tuner_type": "longlora", **checkpointing}
    args = SimpleNamespace(**{**off, **others, "use_liger_kernel": True})
    template = SimpleNamespace(
        padding_free=True, packing=True, sequence_parallel_size=2, is_binary_loss_scale=True
    )
    with pytest.raises(ValueError) as caught:
        swift_trainer.GroundingSeq2SeqTrainer._refuse(None, tiny_qwen_model(), args, template)
    for name in (*others, "use_liger_kernel", "padding_free", "packing", "sequence_parallel_size"):
        assert f"`{name}`" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objectives": {"kal": {}}}, "`objectives.kal`.*did you mean `objectives.klal`"),
        ({"objective": {}}, "`objective`.*did you mean `objectives`"),
        ({"objectives": {"distill": {}}}, "`objectives.distill`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ms_swift.register(**settings)


def test_thousandths_are_refused_since_ms_swift_reads_them_as_pixels(folder, tmp_path):
    with pytest.raises(Exception, match=r"objects.bbox_type.*real or norm1"):
        run(folder, tmp_path / "out", data="thousand")


def test_another_task_is_refused(folder):
    ms_swift.register(**ON)

    class Arguments:
        rlhf_type = "dpo"
        task_type = "causal_lm"

    with pytest.raises(ValueError, match="`rlhf_type`: expected `swift sft`, got dpo"):
        TrainerFactory.get_trainer_cls(Arguments())


def test_the_plugin_of_a_settings_file(tmp_path):
    command = [sys.executable, "-m", "groundkern.integrations.ms_swift"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert path == str(ms_swift.PLUGIN)
    file = tmp_path / "grounding.yaml"
    file.write_text("objectives: {klal: {weight: 0.5}}\n")
    ms_swift.register(file)
    from groundkern.integrations.ms_swift.swift_registry import registered

    assert registered().objectives.klal.weight == 0.5
    with pytest.raises(ValueError, match="GROUNDKERN_SETTINGS"):
        exec(compile(ms_swift.PLUGIN.read_text(), str(ms_swift.PLUGIN), "exec"), {})
