"""axolotl's own config, data, model loading and trainer, with the plugin and without it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, TrainingArguments

from groundkern.hf import DvSft, GroundingCollator, GroundingTrainer, Klal, Smam, attach
from tests.integrations.drawn import samples, write_model, write_samples

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
pytest.importorskip("axolotl", reason="axolotl is not installed (make integrations)")
pytest.importorskip("torchvision", reason="torchvision is not installed (make integrations)")

PLUGIN = "groundkern.integrations.axolotl.GroundkernPlugin"
OBJECTIVES = {"klal": {"weight": 0.5}, "smam": {"gamma": 0.5}, "dv_sft": {"weight": 0.1}}
PARTS = ("text", "map_kl", "smam_grounding", "smam_cross_entropy", "word")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("axolotl")
    write_model(found / "model")
    write_samples(found)
    return found


@pytest.fixture
def config(folder, tmp_path, monkeypatch):
    """Settings of two steps of two micro-batches; axolotl reads image paths from where it runs."""
    monkeypatch.chdir(folder)
    data = {"path": str(folder / "train.jsonl"), "ds_type": "json", "type": "chat_template"}
    return {
        "base_model": str(folder / "model"),
        "processor_type": "AutoProcessor",
        "chat_template": "qwen2_vl",
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "datasets": [data],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "out"),
        "sequence_len": 512,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 0,
        "max_steps": 2,
        "num_epochs": 1,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler": "constant",
        "attn_implementation": "sdpa",
        "val_set_size": 0,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
    }


def grounded(config: dict, objectives: dict | None = None, **section) -> dict:
    objectives = OBJECTIVES if objectives is None else objectives
    return {**config, "plugins": [PLUGIN], "groundkern": {"objectives": objectives, **section}}


def load(config: dict, where: Path):
    """The config as `axolotl train` reads it: from a file."""
    from axolotl.cli.config import load_cfg

    where.mkdir(exist_ok=True, parents=True)
    path = where / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_cfg(str(path))


def run(config: dict):
    """What `axolotl train` does with a config, and the trainer that it leaves."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    cfg = load(config, Path(config["output_dir"]))
    data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    return train(cfg=cfg, dataset_meta=data)[2]


def logged(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


@pytest.fixture
def seen(monkeypatch):
    """The ids of samples in the order in which the collator was given them."""
    from groundkern.integrations.axolotl.collator import RowCollator

    order, call = [], RowCollator.__call__

    def watched(self, rows):
        order.extend(row["id"] for row in rows)
        return call(self, rows)

    monkeypatch.setattr(RowCollator, "__call__", watched)
    return order


class InOrder(GroundingTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_two_steps_are_those_of_the_grounding_trainer(config, folder, tmp_path, seen):
    from groundkern.integrations.axolotl.rows import example_of

    theirs = run(grounded(config))
    assert len(seen) == 4
    rows = {row["id"]: row for row in samples()}
    examples = [example_of(rows[name], root=folder, max_pixels=10**6) for name in seen]
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    before = weights(model)
    attach(model, klal=Klal(weight=0.5), smam=Smam(gamma=0.5), dv_sft=DvSft(weight=0.1))
    ours = InOrder(
        model,
        TrainingArguments(
            str(tmp_path / "ours"),
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=examples,
        data_collator=GroundingCollator(theirs.data_collator.processor, model.config),
    )
    ours.train()
    assert type(theirs).__name__ == "GroundedAxolotlTrainer"
    assert theirs.args.average_tokens_across_devices
    for a, b in zip(logged(theirs), logged(ours), strict=True):
        for name in ("loss", "grad_norm", *PARTS):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    trained = weights(theirs.model)
    torch.testing.assert_close(trained, weights(model), rtol=1e-5, atol=1e-6)
    moved = [name for name, x in trained.items() if not torch.equal(x, before[name])]
    assert len(moved) > len(before) / 2
    assert all(line["tokens/trainable"] > 0 for line in logged(theirs))


def test_weights_of_0_are_axolotls_own_run(config):
    """Its batches, labels, normalising and order are met.

    Not under accumulation: there transformers takes the mean of the micro-batches' own means for
    Qwen2.5-VL, whose class says that its loss takes no count of the whole step.
    """
    config |= {"micro_batch_size": 2, "gradient_accumulation_steps": 1}
    plain = run(config)
    assert not plain.model_accepts_loss_kwargs
    nothing = {"klal": {"weight": 0}, "dv_sft": {"weight": 0}}
    ours = run(grounded(config, nothing))
    assert type(plain).__name__ == "AxolotlTrainer"
    for a, b in zip(logged(ours), logged(plain), strict=True):
        for name in ("loss", "grad_norm", "tokens/trainable"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
        assert a["map_kl"] > 0
    torch.testing.assert_close(weights(ours.model), weights(plain.model), rtol=1e-5, atol=1e-6)


def test_a_plugin_without_objectives_says_so(config, caplog):
    from axolotl.utils.dict import DictDefault

    from groundkern.integrations.axolotl import GroundkernPlugin

    GroundkernPlugin().pre_model_load(DictDefault({"plugins": [PLUGIN], "groundken": {}}))
    assert "`groundkern.objectives`: none is on" in caplog.text


def test_without_objectives_nothing_is_changed(config):
    plain = run(config)
    ours = run(grounded(config, {"klal": None}))
    assert type(ours).__name__ == "AxolotlTrainer"
    assert type(ours.data_collator) is type(plain.data_collator)
    assert not ours.args.average_tokens_across_devices
    torch.testing.assert_close(weights(ours.model), weights(plain.model), rtol=0, atol=0)


def test_a_run_that_never_had_a_row_ends(config):
    with pytest.raises(ValueError, match=r"`objectives.hist`: expected samples with phrases"):
        run(grounded(config, {"hist": {}}))


def test_adapters_checkpoints_and_held_out_samples(config, folder):
    lora = {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_qkv_kernel": False,  # axolotl 0.21 looks for a class that Qwen2.5-VL has not
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
        "save_strategy": "steps",
        "save_steps": 1,
        "test_datasets": [{**config["datasets"][0], "split": "train"}],
        "eval_steps": 2,
        "eval_strategy": "steps",
    }
    klal = {"head_weight": "learned"}
    trainer = run({**grounded(config, {"klal": klal}), **lora})
    trained = {name for name, x in trainer.model.named_parameters() if x.requires_grad}
    assert {"lora_A" in name for name in trained} == {True, False}
    assert any("head_weight" in name for name in trained)
    held_out = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert held_out and all(line["eval_map_kl"] > 0 for line in held_out)
    assert held_out[-1]["eval_loss"] != held_out[0]["eval_loss"]
    out = Path(config["output_dir"])
    written = {str(path.relative_to(out)) for path in out.rglob("*.safetensors")}
    assert {"adapter_model.safetensors", "groundkern_trained.safetensors"} <= written
    assert "checkpoint-1/adapter_model.safetensors" in written


CONFLICTS = [
    ({"sample_packing": True}, "sample_packing"),
    ({"train_on_inputs": True}, "train_on_inputs"),
    ({"image_size": 56}, "image_size"),
    ({"skip_prepare_dataset": False}, "skip_prepare_dataset"),
    ({"remove_unused_columns": True}, "remove_unused_columns"),
    ({"use_dft": True}, "use_dft"),
    ({"chunked_cross_entropy": True}, "chunked_cross_entropy"),
    ({"pad_to_sequence_len": True}, "pad_to_sequence_len"),
    ({"processor_type": None}, "processor_type"),
    (
        {"plugins": [PLUGIN, "axolotl.integrations.liger.LigerPlugin"]}
        | {"liger_fused_linear_cross_entropy": True},
        "liger_fused_linear_cross_entropy",
    ),
]


@pytest.mark.parametrize(("given", "name"), CONFLICTS, ids=lambda x: x if type(x) is str else "")
def test_what_cannot_go_together_is_refused(config, tmp_path, given, name):
    with pytest.raises(ValueError, match=f"`{name}`: expected"):
        load({**grounded(config), **given}, tmp_path)


def test_what_of_a_data_set_cannot_go_together_is_refused(config, tmp_path):
    (data,) = config["datasets"]
    with pytest.raises(ValueError, match=r"`datasets\[0\].train_on_eos`: expected turn"):
        load({**grounded(config), "datasets": [{**data, "train_on_eos": "all"}]}, tmp_path)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"objectives": {"klal": {"wieght": 1}}},
            "groundkern: `objectives.klal.wieght`.*mean `objectives.klal.weight`",
        ),
        ({"objectives": {"dv_sft": {"smoothing": 1.5}}}, r"a number in \[0, 1\)"),
    ],
)
def test_the_section_is_validated(config, tmp_path, section, said):
    with pytest.raises(ValueError, match=said):
        load({**config, "plugins": [PLUGIN], "groundkern": section}, tmp_path)


def test_what_is_null_stays_null(config, tmp_path):
    """axolotl leaves out what is None when it dumps its config: the default would come back."""
    from groundkern.integrations.axolotl.settings import section_of

    given = grounded(config, {"logit_lens": {}}, supervision={"lens_outside": None})
    section = section_of(load(given, tmp_path))
    assert section.supervision.lens_outside is None
    assert section.attached.keys() == {"logit_lens"}


def test_data_sets_of_several_folders_need_a_root(config, folder, tmp_path):
    """`0.png` of the second file would be that of the first one's folder."""
    other = tmp_path / "other" / "train.jsonl"
    other.parent.mkdir()
    other.write_bytes((folder / "train.jsonl").read_bytes())
    (data,) = config["datasets"]
    several = {"datasets": [data, {**data, "path": str(other)}]}
    with pytest.raises(ValueError, match=r"`groundkern.root`: expected a folder"):
        load({**grounded(config), **several}, tmp_path / "a")
    load({**grounded(config, root=str(folder)), **several}, tmp_path / "b")


def test_every_refused_name_is_one_of_axolotls():
    from axolotl.integrations.cut_cross_entropy.args import CutCrossEntropyArgs
    from axolotl.integrations.expert_parallel.args import ExpertParallelArgs
    from axolotl.integrations.kd.args import KDArgs
    from axolotl.integrations.liger.args import LigerArgs
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.datasets import SFTDataset

    from groundkern.integrations.axolotl.conflicts import OF_DATASET, OFF, ONLY

    kinds = (AxolotlInputConfig, CutCrossEntropyArgs, ExpertParallelArgs, KDArgs, LigerArgs)
    known = set().union(*(kind.model_fields for kind in kinds))
    assert {*OFF, *ONLY} - known == set()
    assert OF_DATASET.keys() - SFTDataset.model_fields.keys() == set()


def test_another_plugins_trainer_is_refused(config):
    from axolotl.utils.dict import DictDefault

    from groundkern.integrations.axolotl import GroundkernPlugin

    class Other:
        data_collator = None

    with pytest.raises(ValueError, match="expected GroundkernPlugin before plugins with a trainer"):
        GroundkernPlugin().post_trainer_create(DictDefault(grounded(config)), Other())


def test_a_trainer_class_of_the_config_is_the_base():
    from axolotl.utils.dict import DictDefault

    from groundkern.hf import GroundingMixin
    from groundkern.integrations.axolotl import GroundkernPlugin

    cfg = DictDefault({"trainer_cls": "transformers.Trainer"})
    cfg["groundkern"] = {"objectives": {"klal": {}}}
    found = GroundkernPlugin().get_trainer_cls(cfg)
    assert found.__name__ == "GroundedTrainer"
    assert issubclass(found, GroundingMixin)
    assert GroundkernPlugin().get_trainer_cls(DictDefault({})) is None


def test_the_yaml_of_the_page_is_valid(config, tmp_path):
    from groundkern.integrations.axolotl.settings import section_of

    text = (Path(__file__).parents[2] / "docs" / "trainers" / "axolotl.md").read_text("utf-8")
    page = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    here = {name: config[name] for name in ("base_model", "datasets", "output_dir", "bf16", "fp16")}
    section = section_of(load({**page, **here}, tmp_path))
    assert section.attached.keys() == {"klal", "smam", "dv_sft"}


def test_rows_are_samples(folder):
    from groundkern.integrations.axolotl.rows import example_of, root_of

    read = {"root": folder, "max_pixels": 10**6}
    row = samples()[0]
    wanted = example_of(row, **read)
    assert wanted.images[0].size == (140, 112)
    nulls = {**row, "phrases": None, "regions": [{**row["regions"][0], "points": None}]}
    assert example_of(nulls, **read).regions == wanted.regions
    assert example_of({**row, "regions": json.dumps(row["regions"])}, **read) == wanted
    named = {**row, "images": None}
    text = row["messages"][0]["content"][1]
    part = {"type": "image", "path": str(folder / "0.png"), "text": None}
    named["messages"] = [{"role": "user", "content": [part, text]}, row["messages"][1]]
    assert example_of(named, **read).messages == wanted.messages
    assert part["path"]  # the row stays as it was
    entries = [{"path": str(folder / "train.jsonl")}]
    assert root_of(None, entries) == root_of(None, [{"path": str(folder)}]) == folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": ["../0.png"]}, "sample 's0': `images\\[0\\]`: expected a relative path inside"),
        ({"images": [{"bytes": b""}]}, "`images\\[0\\]`: expected the path of a file, got dict"),
        ({"regions": [{"text": "row 2"}]}, "sample 's0': `regions\\[0\\]"),
        ({"bboxes": [[0, 0, 1, 1]]}, "sample 's0': `bboxes`: expected a field of the format"),
    ],
)
def test_bad_rows_are_named(folder, change, said):
    from groundkern.integrations.axolotl.rows import example_of

    with pytest.raises(ValueError, match=said):
        example_of({**samples()[0], **change}, root=folder, max_pixels=10**6)


def test_images_that_are_not_files_are_refused(folder):
    from groundkern.integrations.axolotl.rows import example_of

    row = samples()[0]
    for key, value in (("base64", "aGk="), ("url", "scheme://host/a.png")):
        part = {"type": "image", key: value}
        messages = [{"role": "user", "content": [part]}, row["messages"][1]]
        with pytest.raises(ValueError, match=f"`{key}`: expected the path of a file"):
            example_of({**row, "images": [], "messages": messages}, root=folder, max_pixels=100)
