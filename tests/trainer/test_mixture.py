"""Several data files with weights: what an epoch takes, and that files stay apart."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from groundkern.trainer.config import ConfigError, validate
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.epochs import EpochSampler, taken
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.mixture import Mixture
from groundkern.trainer.data.order import Course, Order


def write(path, texts):
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"messages": [{"role": "assistant", "content": text}]}) for text in texts]
    path.write_text("\n".join(lines))
    return path


def config(train, **data):
    values = {"model": {"path": "m"}, "data": {"train": train, **data}}
    values["training"] = {"output": "o", "steps": 1}
    return validate(values, where=lambda loc: "test")


@pytest.mark.parametrize("weight", [0.5, 1, 2, 2.5, 0.3])
def test_epochs_take_every_sample_as_often(weight):
    count = max(1, round(weight * 10))
    epochs = [taken(10, weight, seed=(3, 0), epoch=epoch) for epoch in range(20)]
    assert [len(each) for each in epochs] == [count] * 20
    assert set(Counter(np.concatenate(epochs).tolist()).values()) == {2 * count}
    assert max(Counter(epochs[0].tolist()).values()) <= np.ceil(weight)


def test_half_of_a_file_is_another_half_in_the_next_epoch():
    first, second = (set(taken(10, 0.5, seed=(0, 0), epoch=e).tolist()) for e in (0, 1))
    assert first | second == set(range(10))


def test_an_epoch_follows_from_seed_and_number_alone():
    orders = [EpochSampler([4, 6], [2, 0.5], seed=seed) for seed in (1, 1, 2)]
    orders[1].set_epoch(5)
    list(orders[1])
    for order in orders:
        order.set_epoch(3)
    one, same, other = map(list, orders)
    assert len(one) == len(orders[0]) == 11
    assert one == same != other
    counted = Counter(one)
    assert [counted[i] for i in range(4)] == [2] * 4
    assert sum(counted[i] for i in range(4, 10)) == 3


def test_groups_of_about_the_same_length():
    lengths = np.random.default_rng(0).lognormal(6, 1, 4000)
    order = EpochSampler([4000], [1], seed=0, lengths=lengths, group=8)
    grouped = np.array(list(order)).reshape(-1, 8)
    assert sorted(grouped.reshape(-1).tolist()) == list(range(4000))

    def padding(batches):
        return 1 - lengths.sum() / (lengths[batches].max(1) * 8).sum()

    plain = np.array(list(EpochSampler([4000], [1], seed=0))).reshape(-1, 8)
    assert padding(grouped) < 0.2 < 0.6 < padding(plain)


def test_a_mixture_is_its_files_one_behind_the_other(tmp_path):
    paths = [write(tmp_path / name / "d.jsonl", name * 2) for name in "ab"]
    (tmp_path / "b" / "d.jsonl").open("a").write("\nno JSON")
    parts = [JsonLinesDataset(path, name=str(path)) for path in paths]
    mixed = Mixture(parts, [1, 2])
    assert (len(mixed), mixed.in_epoch, mixed.bad.total) == (4, 6, 5)
    assert [mixed[i].messages[-1]["content"] for i in range(4)] == ["a", "a", "b", "b"]
    assert [bad.where for bad in mixed.bad] == [f"{paths[1]}:3"]
    assert mixed.counts["characters"].tolist() == [1] * 4
    assert mixed.digest != Mixture(parts[::-1], [1, 2]).digest
    with pytest.raises(IndexError):
        mixed[4]


def test_bad_samples_of_all_files_count_together(tmp_path):
    good, bad = write(tmp_path / "a.jsonl", "abcdef"), write(tmp_path / "b.jsonl", "a")
    parts = [JsonLinesDataset(path, max_bad_fraction=0.2) for path in (good, bad)]
    joint = Mixture(parts, [1, 1]).bad
    parts[1]._report(SampleError("b.jsonl:1: late"))
    assert [each.where for each in joint] == ["b.jsonl:1"]
    with pytest.raises(SampleError, match="2 of 7"):
        parts[0]._report(SampleError("a.jsonl:1: late"))


def test_forms_of_the_setting():
    assert config("a.jsonl", root="r").data.train_files[0].root.name == "r"
    files = config([{"path": "a", "weight": 2}, {"path": "b", "root": "s"}], root="r").data
    assert [(f.path.name, f.weight, f.root.name) for f in files.train_files] == [
        ("a", 2, "r"),
        ("b", 1, "s"),
    ]
    assert config(files.model_dump()["train"]).data.train[0].weight == 2


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ([], "`data.train`: expected at least one, got none"),
        (3, "`data.train`: expected a path, got 3"),
        ([{"path": "a", "weight": 0}], "`data.train.0.weight`: expected greater than 0, got 0"),
        ([{"path": "a", "share": 1}], "`data.train.0.share`: no such field; --help"),
        ([{"path": "a", "wei": 1}], "no such field; did you mean `data.train.0.weight`?"),
    ],
)
def test_what_is_no_file_or_weight_is_refused(train, sentence):
    with pytest.raises(ConfigError) as error:
        config(train)
    assert sentence in str(error.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_continues_in_a_later_epoch_takes_its_samples(processes):
    def loader():
        order = EpochSampler([4, 6], [2, 0.5], seed=1)
        made = DataLoader(range(10), batch_size=2, sampler=order)
        made = prepare_data_loader(
            made, num_processes=processes, process_index=0, put_on_device=False
        )
        if processes > 1:  # as `CountingTrainer` does
            made.set_sampler(Order(order, Course(11, 2 * processes, 1)))
        return made

    whole, continued = loader(), skip_first_batches(loader(), 1)
    for each in (whole, continued):
        each.set_epoch(3)
    batches = [batch.tolist() for batch in whole]
    assert [batch.tolist() for batch in continued] == batches[1:]
    order = EpochSampler([4, 6], [2, 0.5], seed=1)
    order.set_epoch(3)
    assert batches[0] == list(order)[:2]
