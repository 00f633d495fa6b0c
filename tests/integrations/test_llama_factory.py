"""LLaMA-Factory's own runs on a tiny Qwen2.5-VL: `make integrations`."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("llamafactory", reason="LLaMA-Factory is not installed: `make integrations`")

from llamafactory import launcher
from llamafactory.train.sft import workflow
from PIL import Image
from transformers import AutoModelForImageTextToText, TrainingArguments

from groundkern.hf import (
    GroundedExample,
    GroundingCollator,
    GroundingTrainer,
    attach,
    load_processor,
)
from groundkern.integrations import llama_factory
from groundkern.integrations.llama_factory import data, patch
from groundkern.integrations.shared.settings import read_settings
from tests.hf.collating import make_region
from tests.integrations.programs import (
    BOX,
    SIZES,
    save_images,
    save_tiny,
    shown,
    with_video_part,
    write_json,
)

ON = {"objectives": {"klal": {}, "smam": {}}}
ANSWERS = ("The red patch is in row 2.", "A total.")
COLUMNS = {"messages": "messages", "images": "images"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
TAGS["assistant_tag"] = "assistant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two samples with a region in the first one, others with boxes in their answers."""
    made = tmp_path_factory.mktemp("llama_factory")
    with_video_part(save_tiny(made / "model"))
    images = save_images(made)
    samples = [
        {"messages": _chat("Where is the red patch?", ANSWERS[0]), "images": images[:1]},
        {"messages": _chat("Read the word.", ANSWERS[1]), "images": images[1:]},
    ]
    region = {"text": "red patch", "box": list(BOX)}
    with_regions = [{**samples[0], "regions": [region]}, {**samples[1], "regions": []}]
    (x0, y0, x1, y1), (w, h) = BOX, SIZES[0]
    inside = [round(1000 * v / s) for v, s in zip((x0, y0, x1, y1), (w, h, w, h))]
    written = (
        f"The red patch<|box_start|>({inside[0]},{inside[1]}),({inside[2]},{inside[3]})<|box_end|>."
    )
    in_answers = [{**samples[0], "messages": _chat("Where?", written)}]
    text = {"messages": [dict(m) for m in samples[1]["messages"]], "images": [], "regions": []}
    text["messages"][0]["content"] = "Say it."
    files = {"regions": with_regions, "plain": samples, "boxes": in_answers}
    files["mixed"] = [text, with_regions[0]]
    info = {"formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS}
    for name, records in files.items():
        write_json(made / f"{name}.json", records)
    write_json(
        made / "dataset_info.json",
        {name: {"file_name": f"{name}.json", **info} for name in files},
    )
    return made


def _chat(question, answer):
    return [
        {"role": "user", "content": f"<image>{question}"},
        {"role": "assistant", "content": answer},
    ]


def options(folder, output, **more):
    """LLaMA-Factory's arguments of two steps."""
    return {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "template": "qwen2_vl",
        "dataset": "regions",
        "dataset_dir": str(folder),
        "cutoff_len": 512,
        "overwrite_cache": True,
        "output_dir": str(output),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_shuffling": True,
        **more,
    }


def run_plainly(args):
    """LLaMA-Factory's own function, which `install` has put another in the place of."""
    patch._OWN["train"]({"args": args, "callbacks": []})


def history(output):
    lines = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [line for line in lines if "loss" in line]


@pytest.fixture
def batches(monkeypatch):
    """The batches that a run makes."""
    kept, own = [], data.GroundingDataCollator.__call__

    def call(self, features):
        kept.append(own(self, features))
        return dict(kept[-1])

    monkeypatch.setattr(data.GroundingDataCollator, "__call__", call)
    return kept


def reference(folder, batch):
    """(our collator, its batch) of the same samples, tokenised by the model's chat template."""
    processor = load_processor(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    collate = GroundingCollator(processor, model.config, pad_to_multiple_of=8)
    examples = []
    for number, (answer, question) in enumerate(
        zip(ANSWERS, ("Where is the red patch?", "Read the word."))
    ):
        regions = ()
        if number == 0:
            box = tuple(v / s for v, s in zip(BOX, 2 * SIZES[0]))
            regions = (make_region(answer, "red patch", turn=2, boxes=(box,)),)
        system = {"role": "system", "content": "You are a helpful assistant."}
        chat = _chat("", answer)
        chat[0]["content"] = [{"type": "image"}, {"type": "text", "text": question}]
        image = Image.open(folder / f"{number}.png")
        examples.append(GroundedExample((image,), [system, *chat], regions))
    return model, collate, examples


def test_a_run_is_that_of_our_trainer(folder, tmp_path, batches):
    """Same tokens, same rows, same losses and gradients."""
    llama_factory.run(options(folder, tmp_path / "out", groundkern=ON))
    model, collate, examples = reference(folder, batches[0])
    wanted = collate(examples)
    for name, x in wanted.items():
        if name in ("gk_text_position", "labels"):  # ours leaves the last line break out
            continue
        if name == "mm_token_type_ids":  # LLaMA-Factory gives the positions instead
            assert "position_ids" in batches[0]
            continue
        torch.testing.assert_close(batches[0][name], x, rtol=0, atol=0, msg=name)
    labels = batches[0]["labels"]
    for row, own in zip(batches[0]["gk_text_position"], labels):
        assert row[row >= 0].tolist() == ((own != -100).nonzero()[:, 0] - 1).tolist()

    attach(model, **read_settings(ON, "test").attached)
    arguments = TrainingArguments(
        str(tmp_path / "ours"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    given = dict(batches[0])
    trainer = GroundingTrainer(
        model, arguments, train_dataset=examples, data_collator=lambda _: dict(given)
    )
    trainer.train()
    ours = [line for line in trainer.state.log_history if "loss" in line]
    theirs = history(tmp_path / "out")
    names = {"loss", "grad_norm", "text", "map_kl", "smam_grounding", "smam_cross_entropy"}
    assert names <= theirs[0].keys()
    for line, found in zip(ours, theirs, strict=True):
        for name in names:
            assert found[name] == pytest.approx(line[name], rel=2e-4), name


def test_without_objectives_it_is_llama_factorys_run(folder, tmp_path):
    run_plainly(options(folder, tmp_path / "plain"))
    llama_factory.run(options(folder, tmp_path / "off", groundkern={}))
    plain, off = history(tmp_path / "plain"), history(tmp_path / "off")
    assert len(plain) == 2 and plain[0]["loss"] > plain[1]["loss"]
    for line, found in zip(plain, off, strict=True):
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(line[name], rel=1e-5), name


def test_the_supervised_tokens_are_the_phrase_and_its_box(folder, tmp_path, batches):
    llama_factory.run(options(folder, tmp_path / "out", groundkern=ON, max_steps=1))
    batch, processor = batches[0], load_processor(folder / "model")
    assert shown(processor, batch, 0, batch["gk_side_position"]).strip() == "red patch"
    columns = batch["gk_map_columns"][0]
    inside = batch["gk_side_inside"][0, 0][columns[columns >= 0].long()]
    assert inside.nonzero()[:, 0].tolist() == [6, 7]  # of 4 rows of 5


def test_geometry_is_that_of_resized_images(folder, tmp_path, batches):
    """`image_max_pixels` makes the first image one of 2 x 3 visual tokens."""
    small = options(folder, tmp_path / "out", groundkern=ON, max_steps=1, image_max_pixels=5000)
    llama_factory.run(small)
    batch = batches[0]
    grid = batch["image_grid_thw"][0].tolist()
    assert grid[1] * grid[2] // 4 == int((batch["gk_image"][0] >= 0).sum()) < 20
    columns = batch["gk_map_columns"][0]
    inside = batch["gk_side_inside"][0, 0][columns[columns >= 0].long()]
    rows, cols = grid[1] // 2, grid[2] // 2
    x0, y0, x1, y1 = (v / s for v, s in zip(BOX, 2 * SIZES[0]))
    for at, is_inside in enumerate(inside.tolist()):
        row, col = divmod(at, cols)
        overlaps = x0 < (col + 1) / cols and col / cols < x1 and y0 < (row + 1) / rows
        assert is_inside == (overlaps and row / rows < y1), (row, col)


def test_boxes_in_answers_are_regions(folder, tmp_path, batches):
    given = options(folder, tmp_path / "out", groundkern=ON, dataset="boxes", max_steps=1)
    llama_factory.run(given)
    batch = batches[0]
    columns = batch["gk_map_columns"][0]
    inside = batch["gk_side_inside"][0].any(0)[columns[columns >= 0].long()]
    assert inside.nonzero()[:, 0].tolist() == [6, 7]


def test_a_batch_without_images_trains_as_it_does_without_groundkern(folder, tmp_path):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    write_json(folder / "texts.json", [{"messages": chat}] * 2)
    info = json.loads((folder / "dataset_info.json").read_text())
    columns = {"messages": "messages"}
    info["texts"] = {**info["plain"], "file_name": "texts.json", "columns": columns}
    write_json(folder / "dataset_info.json", info)
    run_plainly(options(folder, tmp_path / "plain", dataset="texts", max_steps=1))
    off = options(folder, tmp_path / "off", dataset="texts", max_steps=1, groundkern={})
    llama_factory.run(off)
    plain, found = history(tmp_path / "plain"), history(tmp_path / "off")
    assert found[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)


def test_a_sample_of_text_beside_one_with_an_image(folder, tmp_path, batches):
    llama_factory.run(options(folder, tmp_path / "out", groundkern=ON, dataset="mixed"))
    batch, processor = batches[0], load_processor(folder / "model")
    assert (batch["gk_image"][0] < 0).all() and (batch["gk_image"][1] >= 0).sum() == 20
    assert (batch["gk_side_position"][0] < 0).all()
    assert shown(processor, batch, 1, batch["gk_side_position"]).strip() == "red patch"


def test_accumulation_changes_nothing(folder, tmp_path):
    """One sample has all regions: a mean of micro-batches' means would be half as much."""
    llama_factory.run(options(folder, tmp_path / "whole", groundkern=ON))
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    llama_factory.run(options(folder, tmp_path / "cut", groundkern=ON, **cut))
    for whole, found in zip(history(tmp_path / "whole"), history(tmp_path / "cut"), strict=True):
        for name in ("loss", "grad_norm", "text", "map_kl", "smam_grounding"):
            assert found[name] == pytest.approx(whole[name], rel=2e-4), name


def test_adapters_evaluations_and_a_run_that_goes_on(folder, tmp_path):
    klal = {"objectives": {"klal": {"head_weight": "learned"}}}
    more = {"finetuning_type": "lora", "lora_target": "all", "lora_dropout": 0}
    more |= {"eval_dataset": "regions", "eval_strategy": "steps", "eval_steps": 1}
    more |= {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    llama_factory.run(options(folder, tmp_path / "out", groundkern=klal, **more))
    lines = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    first, second = (line for line in lines if "eval_loss" in line)
    assert first["eval_map_kl"] > 0 and first["eval_loss"] != second["eval_loss"]
    for place in (".", "checkpoint-1"):
        assert (tmp_path / "out" / place / "groundkern_trained.safetensors").exists()
    more["resume_from_checkpoint"] = str(tmp_path / "out" / "checkpoint-1")
    llama_factory.run(options(folder, tmp_path / "on", groundkern=klal, **more))
    whole, on = history(tmp_path / "out")[1], history(tmp_path / "on")[-1]
    for name in ("loss", "grad_norm", "map_kl"):
        assert on[name] == pytest.approx(whole[name], rel=1e-4), name


def test_a_run_without_regions_says_so(folder, tmp_path):
    given = options(folder, tmp_path / "out", groundkern=ON, dataset="plain")
    with pytest.raises(ValueError, match=r"`objectives.smam`: expected samples with regions"):
        llama_factory.run(given)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"packing": True}, "`packing`: expected it off"),
        ({"neat_packing": True}, "`neat_packing`"),
        ({"enable_liger_kernel": True}, "`enable_liger_kernel`"),
        ({"use_dft_loss": True}, "`use_dft_loss`"),
        ({"stage": "pt"}, "`stage`: expected sft, got pt"),
        ({"use_reentrant_gc": True}, "`use_reentrant_gc`"),
        (
            {"groundkern": {"objectives": {"kal": {}}}},
            "did you mean `objectives.klal`",
        ),
        (
            {"groundkern": {"objectives": {"klal": {"weigth": 1}}}},
            "did you mean `objectives.klal.weight`",
        ),
        ({"groundkern": {"objectives": {"distill": {}}}}, "`objectives.distill`"),
        ({"groundkern": {"boxes": "boxy"}}, "`groundkern.boxes`"),
    ],
)
def test_refusals(folder, tmp_path, more, said):
    with pytest.raises(Exception, match=said):
        llama_factory.run(options(folder, tmp_path / "out", **{"groundkern": ON, **more}))
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_a_file_without_the_section_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="expected a section `groundkern`"):
        llama_factory.run(options(folder, tmp_path / "out"))


def test_the_command_line(folder, tmp_path, monkeypatch):
    """`train my.yaml key=value`, with overrides in our section too."""
    path = write_json(  # JSON is YAML
        tmp_path / "run.yaml", options(folder, tmp_path / "out", groundkern=ON, max_steps=1)
    )
    command = ["x", "train", path, "groundkern.objectives.klal.weight=0"]
    monkeypatch.setattr(sys, "argv", command)
    llama_factory.main()
    (line,) = history(tmp_path / "out")
    parts = line["text"] + line["smam_grounding"] + line["smam_cross_entropy"]
    assert line["loss"] < parts  # KLAL counts nothing, SMAM half
    assert launcher.__file__.endswith("llama_factory/__main__.py")  # what torchrun is given


def test_llama_factory_is_as_it_was_after_a_run():
    assert workflow.CustomSeq2SeqTrainer.__name__ == "CustomSeq2SeqTrainer"
    assert workflow.SFTDataCollatorWith4DAttentionMask.__module__.startswith("llamafactory")
