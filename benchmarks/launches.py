"""`python -m benchmarks.launches`: kernels that one call launches on a GPU, counted without one.

The public functions run on meta tensors that say they are on a GPU, so that they take every branch
that a GPU would take. Triton's launch is replaced by a recorder; torch's operators are recorded on
their way to the device, and how many kernels one is made of is read from a profile of the same
operator on CPU tensors. Whatever would make the host wait for a value raises here.

For each call, forward and backward apart: Triton launches, matrix products (torch's GEMMs), and
torch's other kernels. benchmarks/counts.json keeps the numbers.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import groundkern as gk
from benchmarks.noting import Launch, noted
from groundkern.ops.cases import Call

GPU = torch.device("cuda", 0)
PROCESSORS = (
    132  # an H100's or H200's; how many splits there are follows from it, not how many launches
)
DEVICE_GUARD = ("current_device", "_exchange_device", "_maybe_exchange_device")
FACTORIES = (
    *("arange", "empty", "empty_permuted", "empty_strided", "full", "ones", "scalar_tensor"),
    *("tensor", "zeros"),
)
GEMMS = {"mm", "addmm", "bmm", "baddbmm"}
# Allocations, and a view that its schema calls none; the schemas know all other views.
NO_KERNEL = {
    *("empty", "empty_like", "empty_permuted", "empty_strided"),
    *("new_empty", "new_empty_strided", "resize_", "set_", "_unsafe_view"),
}


class _Recorder(TorchDispatchMode):
    """Triton launches, the names of GEMMs, and torch's other operators with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.triton: list[Launch] = []
        self.gemms: list[str] = []
        self.operators: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "groundkern":  # its body, where a fake one would stand for it
            with self:
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        with self:  # operators that are written in terms of others
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if name in GEMMS:
            self.gemms.append(name)
            if "out" in kwargs:  # not every overload has a meta kernel
                return kwargs["out"]
        elif not func.is_view and name not in NO_KERNEL:
            self.operators.append((func, args, kwargs))
        return func(*args, **kwargs)


def _made_on_meta(make: Callable) -> Callable:
    """The function, with meta for a GPU among its arguments."""

    @wraps(make)
    def run(*args, **kwargs):
        return make(
            *pytree.tree_map_only(torch.device, _meta, args),
            **{name: _meta(x) if isinstance(x, torch.device) else x for name, x in kwargs.items()},
        )

    return run


def _meta(device: torch.device) -> torch.device:
    return torch.device("meta") if device.type == GPU.type else device


@contextmanager
def recording() -> Iterator[_Recorder]:
    """Meta tensors say that they are on a GPU and what is to be made there is made on meta; what is
    asked of the GPU is recorded."""
    recorder = _Recorder()
    found = SimpleNamespace(multi_processor_count=PROCESSORS)

    patches = [
        (Tensor, "device", property(lambda _: GPU)),
        (Tensor, "is_cuda", property(lambda _: True)),
        (torch.cuda, "get_device_properties", lambda _: found),
        *((torch.cuda, name, lambda *_: GPU.index) for name in DEVICE_GUARD),
        *((torch, name, _made_on_meta(getattr(torch, name))) for name in FACTORIES),
        (Tensor, "to", _made_on_meta(Tensor.to)),
    ]
    with ExitStack() as stack:
        recorder.triton = stack.enter_context(noted(launch=False))
        for owner, name, stand_in in patches:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(recorder)
        yield recorder


def torch_kernels(operators: list[tuple]) -> Counter[str]:
    """How many kernels of each name the operators start: one each, none for views and allocations,
    and where torch has no kernel but calls other operators (logsumexp), as many as those.

    Sorting and adding at an index start several that no operator names: they count once.
    """
    found: Counter[str] = Counter()
    composed = []
    for function, args, kwargs in operators:
        if _has_kernel(function.overloadpacket):
            found.update(_own(function.overloadpacket))
        else:
            composed.append((function, args, kwargs))
    if not composed:
        return found
    calls = pytree.tree_map_only((Tensor, torch.device), _real, composed)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for function, args, kwargs in calls:
            function(*args, **kwargs)
    for event in profile.events():
        if event.cpu_parent is None:
            found.update(_under(event))
    return found


def _real(x: Tensor | torch.device) -> Tensor | torch.device:
    """A CPU tensor of the same shape, strides and dtype for a meta tensor; 0 indexes anything."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_()


def _under(event) -> list[str]:
    """Kernels of an operator in a profile."""
    namespace, _, name = event.name.partition("::")
    packet = getattr(torch.ops.aten, name) if namespace == "aten" else None
    if packet and _has_kernel(packet):
        return _own(packet)
    below = [kernel for child in event.cpu_children for kernel in _under(child)]
    return below or (_own(packet) if packet else [])  # copy_ is one of those that call no other


def _overloads(packet) -> list:
    registered = torch._C._dispatch_has_kernel
    found = (getattr(packet, name) for name in packet.overloads())
    return [overload for overload in found if registered(overload.name())]


def _has_kernel(packet) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(overload.name(), "CPU") for overload in _overloads(packet))


def _own(packet) -> list[str]:
    name = packet.__name__
    views = any(overload.is_view for overload in _overloads(packet))
    return [] if views or name in NO_KERNEL else [name]


# Sizes: 64 rows of Qwen2.5-VL-7B on two sequences of 4096 keys. The head's hidden size is small:
# nothing but the GEMMs depends on it, and they do not run.
ROWS, HEADS, KV_HEADS, DIM, BATCH, KEYS, COLUMNS, REGIONS = 64, 28, 4, 128, 2, 4096, 1024, 8
HIDDEN, VOCABULARY, LABELS, IMAGES = 64, 128_256, 100, 4


def _floats(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def _integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def _rows() -> gk.QueryRows:
    return gk.QueryRows(*(_integers(ROWS) for _ in range(4)))


def _selection(sets: bool) -> dict[str, object]:
    allowed = gk.KeySets(_integers(REGIONS, KEYS // 32), _integers(ROWS), KEYS) if sets else None
    return {"rows": _rows(), "allowed": allowed}


def _attention(names: str) -> dict[str, Tensor]:
    of_row, of_key = (ROWS, HEADS, DIM), (BATCH, KV_HEADS, KEYS, DIM)
    return {name: _floats(*(of_row if name in "qg" else of_key)) for name in names}


def _side(sets: bool, lse: bool) -> Call:
    statistics = _floats(ROWS, HEADS, dtype=torch.float32) if lse else None
    options = {**_selection(sets), "lse": statistics}
    return Call(gk.side_attention, _attention("qkv"), options)


def _maps(function: Callable, over: str, sets: bool = False, **options) -> Call:
    inputs = _attention("qkvg" if function is gk.attention_contribution else "qk")
    if function is gk.attention_kl:
        inputs["target"] = _floats(ROWS, COLUMNS, dtype=torch.float32)
    options |= {**_selection(sets), "columns": _integers(BATCH, COLUMNS), "over": over}
    return Call(function, inputs, options, fixed=("target",))


def _loss(
    rows: int, function: Callable = gk.linear_cross_entropy, trained: bool = True, **options
) -> Call:
    inputs = {"hidden": _floats(rows, HIDDEN), "weight": _floats(VOCABULARY, HIDDEN)}
    if "smoothing" in options:
        sizes = (LABELS, IMAGES + 1, rows)
        options["bags"] = gk.LabelBags(*(_integers(n, dtype=torch.int64) for n in sizes))
    options["target"] = _integers(rows, dtype=torch.int64)
    return Call(function, inputs, options, fixed=() if trained else ("weight",))


def _take() -> Call:
    inputs = {"x": _floats(BATCH, HEADS, KEYS, DIM)}
    return Call(gk.QueryRows.take, inputs, {"self": _rows()})


def _causal() -> Call:
    options = {"sequence": _integers(ROWS), "position": _integers(ROWS)}
    return Call(lambda **o: gk.QueryRows.causal(**o).stop, {}, options)


def _regions() -> Call:
    options = {"visual": (BATCH, KEYS), "inside": (REGIONS, KEYS)}
    options = {name: _integers(*shape, dtype=torch.bool) for name, shape in options.items()}
    options |= {"sequence": _integers(REGIONS), "index": _integers(ROWS)}
    return Call(lambda **o: gk.KeySets.regions(**o).words, {}, options)


_KL = [
    (heads, over, sets)
    for heads in ("mean", "each")
    for over in ("visible", "columns")
    for sets in (False, True)
]
# The last three are no ops: `take` is what a layer pays before them, the others a step.
CASES: dict[str, Callable[[], Call]] = {
    "side_attention": partial(_side, False, False),
    "side_attention sets": partial(_side, True, False),
    "side_attention sets lse": partial(_side, True, True),
    **{
        f"{function.__name__} {over}": partial(_maps, function, over)
        for function in (gk.attention_map, gk.attention_contribution)
        for over in ("visible", "columns")
    },
    **{
        f"attention_kl {heads} {over}{' sets' * sets}": partial(
            _maps, gk.attention_kl, over, sets, heads=heads
        )
        for heads, over, sets in _KL
    },
    "linear_cross_entropy 512 rows": partial(_loss, 512),
    "linear_cross_entropy 512 rows smoothed": partial(_loss, 512, smoothing=0.3),
    "linear_cross_entropy 512 rows per row": partial(_loss, 512, reduction="none"),
    "linear_cross_entropy 512 rows frozen": partial(_loss, 512, trained=False),
    "linear_cross_entropy 512 rows frozen smoothed": partial(
        _loss, 512, trained=False, smoothing=0.3
    ),
    "linear_cross_entropy 8192 rows": partial(_loss, 8192),
    "linear_log_prob 512 rows": partial(_loss, 512, gk.linear_log_prob),
    "QueryRows.take": _take,
    "QueryRows.causal": _causal,
    "KeySets.regions": _regions,
}


class Counts(NamedTuple):
    """How often each kernel is launched."""

    triton: Counter[str]
    gemms: Counter[str]
    torch: Counter[str]


def _counts(recorder: _Recorder) -> Counts:
    return Counts(
        Counter(x.name for x in recorder.triton),
        Counter(recorder.gemms),
        torch_kernels(recorder.operators),
    )


def count(make: Callable[[], Call]) -> dict[str, Counts]:
    """What a call launches "forward" and, where its result carries gradient, "backward": the second
    call with the same rows and sets, as in all layers but the first. "first forward" and "first
    backward" are there where the first one launches something else.
    """
    with recording():
        call = make()
        leaves = {n: x.requires_grad_(n not in call.fixed) for n, x in call.inputs.items()}
    found: dict[str, Counts] = {}
    for turn in ("first ", ""):
        with recording() as forward:
            result = call.run()[0]
        found[f"{turn}forward"] = _counts(forward)
        if not result.requires_grad:
            continue
        with recording():
            upstream = torch.empty_like(result)
        with recording() as backward:
            torch.autograd.grad(result, [x for x in leaves.values() if x.requires_grad], upstream)
        found[f"{turn}backward"] = _counts(backward)
    for way in ("forward", "backward"):
        if found.get(f"first {way}") == found.get(way):
            found.pop(f"first {way}", None)
    return found


def counts() -> dict[str, dict[str, int]]:
    """As counts.json has them: name -> e.g. {"forward triton": 4}."""
    table = {}
    for name, make in CASES.items():
        table[f"gpu/{name}"] = {
            f"{way} {kind}": sum(kernels.values())
            for way, found in count(make).items()
            for kind, kernels in found._asdict().items()
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--only", default="", help="calls whose name contains this")
    parser.add_argument("--json", action="store_true", help="the numbers, as counts.json has them")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # kernel modules, imported by the calls, read it
    if args.json:
        print(json.dumps(counts()))
        return
    for name, make in CASES.items():
        if args.only not in name:
            continue
        for way, found in count(make).items():
            print(f"{name}, {way}:")
            for kind, kernels in found._asdict().items():
                names = ", ".join(f"{n} {x}" if n > 1 else x for x, n in sorted(kernels.items()))
                print(f"  {kind:7}{sum(kernels.values()):4}  {names}")


if __name__ == "__main__":
    sys.exit(main())
