"""One step of a model on two ranks, wrapped for each kind of data parallelism: a program that
test_ranks.py runs.

python -m tests.hf.forked tests.hf.ranks FOLDER ddp fsdp2 zero3
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern.hf import (
    DvSft,
    IdleImage,
    Klal,
    Smam,
    attach,
    doctor,
    has_images,
    load_beside_adapter,
    row_counts,
    save_beside_adapter,
)
from groundkern.hf.watching.finite import gradient_norm, skip_step, step_taken
from tests.hf.methods import METHODS
from tests.hf.samples import SAMPLES, Sample, make_batch, weighted

LINEARS = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)|.*lm_head"
TOWER_TOO = r".*\.(q_proj|v_proj|qkv|up_proj)"
FIRST, SECOND, TEXT, FOURTH = SAMPLES["qwen"]  # TEXT has no image and trained text only
HEAVY = weighted(SAMPLES["qwen"])  # rows of other weights on each rank
BLANK = Sample(seed=9, pieces=(3, (2, 2), 6), answer=0)  # an image, and no supervised row at all


@dataclass(frozen=True)
class Case:
    """A model, and the samples that each of the two ranks holds."""

    shares: tuple[tuple[Sample, ...], tuple[Sample, ...]]
    tied: bool = False
    lora: str | None = None  # the modules with adapters
    checkpointed: bool = False
    frozen_vision: bool = False
    methods: str | None = None  # of METHODS; None: the first three

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.shares[0] + self.shares[1]

    def model(self) -> nn.Module:
        """Attached, in training mode, the same on every rank."""
        attention = "eager" if self.methods == "gradcam" else "sdpa"
        model = tiny_qwen_model(tied=self.tied, attention=attention)
        attach(model, **(METHODS[self.methods] if self.methods else THREE))
        if self.frozen_vision:
            model.model.visual.requires_grad_(False)
        if self.lora:
            torch.manual_seed(3)
            config = LoraConfig(r=3, target_modules=self.lora, init_lora_weights=False)
            model = get_peft_model(model, config)
        if self.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()


THREE = {"smam": Smam(weight=0.7), "dv_sft": DvSft(weight=0.5), "klal": Klal(weight=0.8)}
CASES = {
    "uneven rows": Case(((FIRST, SECOND), (TEXT, FOURTH))),
    "a rank without rows": Case(((FIRST, SECOND, FOURTH), (BLANK,))),
    "tied and checkpointed": Case(((FIRST, SECOND), (TEXT, FOURTH)), tied=True, checkpointed=True),
    "lora on the head too": Case(((FIRST, SECOND, FOURTH), (BLANK,)), lora=LINEARS),
    "frozen vision, a rank without images": Case(((FIRST, SECOND), (TEXT,)), frozen_vision=True),
    "trained vision, a rank without images": Case(((FIRST, SECOND), (TEXT, TEXT))),
    "the same, checkpointed": Case(((TEXT,), (FIRST, SECOND)), checkpointed=True),
    "lora in the tower, a rank without images": Case(((FIRST, SECOND), (TEXT,)), lora=TOWER_TOO),
    "every method": Case((HEAVY[:2], HEAVY[2:]), methods="attention"),
    "every method, GradCAM": Case(((FIRST, SECOND), (TEXT, FOURTH)), methods="gradcam"),
}
# GradCAM losses are refused on sharded weights.
LEFT_OUT = {"fsdp2": {"every method, GradCAM"}, "zero3": {"every method, GradCAM"}}
LONG = {  # the words "zero3 long" are for these: each takes 4 CPU seconds
    "zero3": {
        "uneven rows",
        "lora on the head too",
        "frozen vision, a rank without images",
        "trained vision, a rank without images",
        "the same, checkpointed",
    }
}


def cases_of(words: str) -> set[str]:
    """The names of a strategy's cases, or with "long" behind it of those that take long."""
    strategy, _, which = words.partition(" ")
    slow = LONG.get(strategy, set())
    return slow if which else CASES.keys() - LEFT_OUT.get(strategy, set()) - slow


def one_process(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the whole batch."""
    model = case.model()
    loss = model(**make_batch(bare(model), case.samples)).loss
    loss.backward()
    return loss.detach(), grads(model)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def bare(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def on_ranks(case: Case, strategy: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, each rank on its own share."""
    model = case.model()
    batch = make_batch(bare(model), case.shares[dist.get_rank()])
    totals = row_counts(batch)
    dist.all_reduce(totals)
    seen = torch.tensor(has_images(batch))
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    needed = seen and not (strategy == "ddp" and case.frozen_vision)
    if needed and not has_images(batch):
        batch = IdleImage(tiny_qwen_processor(), bare(model).config)(batch)
    return STRATEGIES[strategy](model, {**batch, "gk_totals": totals})


def ddp(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    loss = _backward(DistributedDataParallel(model), batch)
    return loss, grads(model)


def fsdp2(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    whole = recorded(model, batch)
    decoder, head = bare(model).get_decoder(), bare(model).get_output_embeddings()
    for layer in (*bare(model).model.visual.blocks, *decoder.layers):
        fully_shard(layer)
    if head.weight is not decoder.embed_tokens.weight:
        fully_shard(head)
    fully_shard(model)
    assert isinstance(head.weight, DTensor)
    examine(model, batch)
    torch.testing.assert_close(recorded(model, batch), whole, rtol=1e-4, atol=1e-5)
    loss = _backward(model, batch)
    return loss, {k: g.full_tensor() for k, g in grads(model).items()}


def zero3(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from groundkern.trainer.launching import without_compiling

    without_compiling()
    whole = recorded(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(trained, lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    assert bare(model).get_output_embeddings().weight.numel() == 0  # sharded
    examine(model, batch)
    torch.testing.assert_close(recorded(model, batch), whole, rtol=1e-4, atol=1e-5)
    loss = engine(**batch).loss * dist.get_world_size()
    engine.backward(loss)
    whole = {k: safe_get_full_grad(p) for k, p in model.named_parameters() if p.requires_grad}
    engine.destroy()
    return _mean(loss), whole


STRATEGIES = {"ddp": ddp, "fsdp2": fsdp2, "zero3": zero3}


def sharded_adapter(folder: Path) -> dict[str, Tensor]:
    """Learned head weights beside an adapter under FSDP2: saved whole, put back on every rank, and
    left alone by a step whose gradient is NaN."""
    model = get_peft_model(tiny_qwen_model(), LoraConfig(r=2, target_modules=LINEARS))
    attach(model, klal=Klal(head_weight="learned")).train()
    weight = bare(model).groundkern_head_weight
    with torch.no_grad():
        weight.copy_(torch.arange(weight.numel()).view_as(weight))
    for layer in bare(model).get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    save_beside_adapter(model, folder, write=dist.get_rank() == 0)
    dist.barrier()
    weight = bare(model).groundkern_head_weight
    assert isinstance(weight, DTensor)
    with torch.no_grad():
        weight.zero_()
    load_beside_adapter(model, folder)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    (model(**make_batch(bare(model), (FIRST,))).loss * float("nan")).backward()
    skip = ~gradient_norm(trained).isfinite()
    skip_step(optimizer, skip)
    optimizer.step()
    step_taken(optimizer)
    return {"weight": weight.full_tensor().detach(), "skipped": skip}


@torch.no_grad()
def recorded(model: nn.Module, batch: dict) -> list[Tensor]:
    """What calls the head, the norms and the output projections by themselves."""
    model.eval()
    found = model(**batch, gk_record=("contributions", "logits"))
    model.train()
    return [found.contributions, found.main_logits, found.side_logits]


def examine(model: nn.Module, batch: dict) -> None:
    """Run doctor if every rank has rows to measure."""
    counts = row_counts(batch)
    dist.all_reduce(counts, dist.ReduceOp.MIN)
    if int(counts[0]):
        doctor(model, {k: x for k, x in batch.items() if k != "gk_totals"})


def _backward(model: nn.Module, batch: dict) -> Tensor:
    """Gradients are averaged over ranks, so each scales its share of the loss by their number."""
    loss = model(**batch).loss * dist.get_world_size()
    loss.backward()
    return _mean(loss)


def _mean(loss: Tensor) -> Tensor:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def main(folder: Path, strategies: list[str]) -> None:
    dist.init_process_group("gloo")
    for strategy in strategies:
        kind = strategy.split()[0]
        results = {name: on_ranks(CASES[name], kind) for name in sorted(cases_of(strategy))}
        if dist.get_rank() == 0:
            torch.save(results, folder / f"{strategy}.pt")
    if "fsdp2" in strategies:
        result = sharded_adapter(folder)
        if dist.get_rank() == 0:
            torch.save(result, folder / "adapter.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Results are on disk. Seen once on a loaded machine: std::terminate, "without an active
    # exception", from a thread of torch's while the interpreter was torn down.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
