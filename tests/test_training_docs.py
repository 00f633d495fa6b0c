"""docs/trainers: the code runs as it stands, and the bare loop equals GroundingTrainer."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.families.zoo.first import tiny_llava_model, tiny_qwen_model, tiny_qwen_processor
from groundkern import KeySets, QueryRows, backends
from groundkern.hf import DvSft, Klal, Smam, attach, detach
from groundkern.hf.model.compiled import is_compiled
from tests.hf.collating import make_example, make_region
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import attached_model, train

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "trainers"


def _blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)


ATTACH, TRAINER = _blocks("transformers.md")
(TRL,) = _blocks("trl.md")
LOOP, IDLE = _blocks("bare-loop.md")
COMPILED, LAYERS, GRAPHED = _blocks("compile.md")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages take for granted, with the first block run."""
    monkeypatch.chdir(tmp_path)
    answer = "the red patch"
    region = make_region(answer, "red patch")
    names = {
        "model": tiny_qwen_model(),
        "processor": tiny_qwen_processor(),
        "examples": [make_example(answer, regions=[region], name=f"{i}") for i in range(4)],
    }
    exec(ATTACH, names)
    yield names
    detach(names["model"])


def test_the_trainer_runs(names):
    exec(TRAINER, names)
    log = names["trainer"].state.log_history
    assert log[-1]["train_loss"] > 0
    assert names["trainer"].state.global_step == 2


def test_an_idle_image_is_added(names):
    exec(IDLE, names)
    grounded = names["collate"](names["examples"])
    text = {name: x for name, x in grounded.items() if name in ("input_ids", "attention_mask")}
    text["input_ids"] = torch.full_like(text["input_ids"], 7)
    assert names["evened"](grounded) is grounded and names["evened"](text) is text  # one process
    assert names["has_images"](names["idle"](text))


def test_layers_are_compiled(names):
    assert not is_compiled(names["model"])
    exec(LAYERS, names)
    assert is_compiled(names["model"])


def test_sft_trainer_runs(names):
    pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
    exec(TRL, names)
    assert names["trainer"].state.global_step == 2


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4)], ids=["4", "1 + 3"])
def test_the_loop_equals_the_trainer(tmp_path, cuts):
    names: dict = {}
    exec(LOOP, names)
    log, wanted = train(tmp_path, max_steps=2, learning_rate=0.002, max_grad_norm=0.0)
    model = attached_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    batches = [make_batch(model, SAMPLES["qwen"][a:b]) for a, b in pairwise(cuts)]
    for line in log[:2]:
        for name, part in names["train_step"](model, optimizer, batches).items():
            assert float(part) == pytest.approx(line[name], rel=2e-5), name
    detach(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-5)


def _layers(number: int):
    """q, k and v of some layers, and what all of them share."""
    shapes = ((2, 2, 16), (1, 2, 48, 16), (1, 2, 48, 16))
    layers = [[torch.randn(s).requires_grad_() for s in shapes] for _ in range(number)]
    rows = QueryRows.causal(torch.zeros(2), torch.tensor([40, 47]))
    sets = torch.tensor([0, 1], dtype=torch.int32)
    allowed = KeySets.from_bool(torch.rand(2, 48) < 0.5, sets)
    columns = torch.arange(8, dtype=torch.int32)[None]
    return layers, (rows, allowed, torch.rand(2, 8), columns)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_compiled_layers_share_a_plan(monkeypatch):
    """One of side attention and one of the KL, however many layers a graph has."""
    pytest.importorskip("triton", reason="CPU backends use no plan")
    monkeypatch.setattr(backends, "_PREFERRED", {"cpu": "triton"})
    calls = Counter()

    def count(graph, _):
        calls.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    names: dict = {}
    # Partitioned as inductor does: that is where calls that are the same become one.
    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    exec(COMPILED, names)
    layers, shared = _layers(2)
    compiled = names["grounding_loss"]
    found, wanted = compiled(layers, *shared), compiled._torchdynamo_orig_callable(layers, *shared)
    torch.testing.assert_close(found, wanted)
    assert calls["groundkern.side_attention.default"] == 2
    assert calls["groundkern.plan.default"] == 2


def _llava_batch(model, order: tuple[int, ...] = (0, 1, 2, 3)) -> dict:
    return make_batch(model, tuple(SAMPLES["llava"][i] for i in order))


def _llava(device: str = "cpu", **options):
    model = attach(tiny_llava_model(), smam=Smam(gamma=0.5), dv_sft=DvSft(), klal=Klal(**options))
    return model.train().to(device)


def test_a_decoder_layer_compiles():
    model = _llava()
    losses, gradients = [], []
    for compiled in (False, True):
        if compiled:
            layer = model.model.language_model.layers[0]
            layer.compile(backend="aot_eager")
        model.zero_grad()
        loss = model(**_llava_batch(model)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    detach(model)
    torch.testing.assert_close(*losses)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_graphed_step_is_the_step():
    weights, parts = [], []
    for graphed in (False, True):
        names = {"model": (model := _llava())}
        exec(GRAPHED, names)
        batches = [_llava_batch(model, order) for order in ((0, 1, 2, 3), (3, 1, 0, 2))]
        step = names["graphed"](names["step"], batches[0]) if graphed else names["step"]
        parts.append([step(batch) for batch in batches])
        if graphed:
            with pytest.raises(ValueError, match=r"input_ids: \[4, \d+\], not"):
                step({**batches[0], "input_ids": batches[0]["input_ids"][:, :-1]})
        weights.append([p.detach() for p in detach(model).parameters()])
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)
    assert parts[0] == parts[1] and parts[0][0] != parts[0][1]


class _Device(SimpleNamespace):
    """torch.cuda as far as a capture uses it; a replay does what was captured."""

    def __init__(self) -> None:
        super().__init__(done=[], current=self._stream("main"))
        self.Stream = lambda: self._stream("side")
        self.stream = lambda stream: nullcontext(self.done.append(f"on {stream.name}"))
        self.current_stream = lambda: self.current
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.done.append("replay"))
        self.is_available = lambda: True

    def _stream(self, name: str) -> SimpleNamespace:
        wait = lambda other: self.done.append(f"{name} waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_stream=wait)

    @contextmanager
    def graph(self, _):
        self.done.append("capture")
        yield
        self.done.append("captured")


def test_the_graph_is_captured_after_warm_steps_and_replayed(monkeypatch):
    device, seen = _Device(), []
    names = {"model": torch.nn.Linear(1, 1)}
    exec(GRAPHED, names)
    for name, made in vars(device).items():
        if name not in ("done", "current"):
            monkeypatch.setattr(torch.cuda, name, made)
    monkeypatch.setattr(torch.cuda, "graph", device.graph)

    def step(batch):
        device.done.append("step")
        seen.append(batch["x"])
        return {"loss": batch["x"]}

    batch = {"x": torch.zeros(2)}
    run = names["graphed"](step, batch, warm_up=2)
    warm = ["side waits for main", "on side", "step", "step", "main waits for side"]
    assert device.done == [*warm, "capture", "step", "captured"]
    results = run({"x": torch.ones(2)})
    assert device.done[-1] == "replay"
    assert results["loss"].tolist() == [1, 1], "the graph reads what was copied"
    assert all(x is seen[0] for x in seen) and batch["x"].tolist() == [0, 0]


class _OnDevice(TorchDispatchMode):
    """Raises where a tensor of the host takes part. Tensors of the meta device have no values that
    could be read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
        assert all(x.is_meta for x in tensors), f"{func} reads from the host"
        return result


@pytest.mark.parametrize("over", ["columns", "visible"])
def test_a_step_of_llava_reads_nothing_on_the_host(over, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = _llava(over=over)
    batch = {name: x.to("meta") for name, x in _llava_batch(model).items()}
    names = {"model": model.to("meta")}
    exec(GRAPHED, names)
    names["optimizer"] = torch.optim.SGD(model.parameters())  # AdamW is capturable on devices only
    with _OnDevice():
        parts = names["step"](batch)
        assert {"text", "word", "map_kl"} <= set(parts)
        with pytest.raises(AssertionError, match="reads from the host"):
            _ = parts["text"] + torch.zeros(1)
        with pytest.raises(RuntimeError, match="meta"):
            float(parts["text"])
    detach(model)


@pytest.mark.gpu
def test_a_replay_is_the_step(monkeypatch):
    """With the weights as they were, every replay finds the parts that the step finds."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    names = {"model": (model := _llava("cuda"))}
    exec(GRAPHED, names)
    orders = ((0, 1, 2, 3), (3, 1, 0, 2))
    batches = [{n: x.cuda() for n, x in _llava_batch(model, o).items()} for o in orders]
    names["optimizer"].param_groups[0]["lr"] = 0.0
    wanted = [{n: x.clone() for n, x in names["step"](batch).items()} for batch in batches]
    run = names["graphed"](names["step"], batches[0])
    for batch, parts in zip(batches, wanted, strict=True):
        for name, part in run(batch).items():
            torch.testing.assert_close(part, parts[name], rtol=1e-3, atol=1e-5, msg=name)
    detach(model)


def test_the_launch_files_are_there_and_read():
    text = (PAGES / "transformers.md").read_text(encoding="utf-8")
    files = re.findall(r"examples/accelerate/\w+\.yaml", text)
    assert len(files) == 3
    for file in files:
        assert yaml.safe_load((ROOT / file).read_text())["num_processes"] == 2
