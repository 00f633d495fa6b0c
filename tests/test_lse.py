"""The main pass's log-sum-exp: what kernels return, what `Watch` sees, and that ops can use it."""

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern import QueryRows, attention_map, available_backends, lse, side_attention
from groundkern.lse import Watch, attention, self_test


@pytest.fixture(autouse=True)
def _untested() -> Iterator[None]:
    """Kernels are self-tested once per process, and some here are stand-ins."""
    lse._tested.cache_clear()
    yield
    lse._tested.cache_clear()


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 6, 41, 32), (2, 2, 41, 32), (2, 2, 41, 32))
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def _truth(q: Tensor, k: Tensor, scale: float) -> Tensor:
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ k.transpose(2, 3) * scale
    future = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
    return s.masked_fill(future, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("aten_flash_cpu", torch.float32),
        ("aten_flash_cpu", torch.bfloat16),
        ("flex", torch.float32),  # eager FlexAttention is slow, and has no backward on CPU
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_kernel_returns_its_statistics(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = _inputs(dtype)
    out, found = attention(q, k, v, kernel=kernel, scale=0.3)
    torch.testing.assert_close(found.double(), _truth(q, k, 0.3), rtol=1e-5, atol=1e-4)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, plain)
    assert found.dtype == torch.float32 and found.shape == q.shape[:3]


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_seen_detached_and_out_is_untouched(masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs())
    mask = torch.ones(41, 41, dtype=torch.bool).tril() if masked else None

    def run() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=True
        )

    plain = run()
    with Watch() as seen:
        out = run()
    found = seen.lse(q)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), _truth(q, k, 32**-0.5), rtol=1e-5, atol=1e-5)
    assert torch.equal(out, plain)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, plain)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_graph_has_the_same_statistics(grouped: bool) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs())
    if not grouped:
        k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    assert lse.graph_is_readable(q, k, v)
    with Watch() as seen:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    found = lse.lse_of_graph(out.transpose(1, 2).contiguous()[:, 3:], q)
    assert torch.equal(found, seen.lse(q)) and not found.requires_grad
    assert lse.lse_of_graph(2.0 * out, q) is None, "not the attention's own output"
    assert lse.lse_of_graph(out, q[:1]) is None and lse.lse_of_graph(q, q) is None
    assert lse.lse_of_graph(out.detach(), q) is None


def test_a_kernel_in_the_graph_is_tested_in_its_own_dtype(monkeypatch) -> None:
    tested, test = [], lse.self_test
    monkeypatch.setattr(lse, "self_test", lambda *names: tested.append(names) or test(*names))
    q, k, v = (x.requires_grad_() for x in _inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert lse.lse_of_graph(out.transpose(1, 2), q) is not None
    assert tested == [("aten_flash_cpu", "cpu", torch.bfloat16)]


def test_hooks_on_saved_tensors_are_not_called() -> None:
    """Those of checkpointing would compute the layer again."""
    q, k, v = (x.requires_grad_() for x in _inputs())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert not lse.graph_is_readable(q, k, v)
    with torch.no_grad():
        assert not lse.graph_is_readable(q, k, v)
    assert not lse.graph_is_readable(*(x.detach() for x in (q, k, v)))


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_backwards_of_gpu_kernels_have_the_known_names(kernel: str) -> None:
    q = torch.empty(1, 4, 96, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
    bias = () if kernel == "flash" else (None, True)
    node = op(q, q, q, *bias, is_causal=True)[0].grad_fn
    name, statistics = lse.SAVED[node.name()]
    assert name == f"aten_{kernel}" and hasattr(node, statistics)


def test_only_a_single_call_on_these_queries_counts() -> None:
    q, k, v = _inputs()
    with Watch() as seen:
        pass
    assert seen.lse(q) is None
    with Watch() as seen:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert seen.lse(q[:1]) is None and seen.lse(q[:, :2]) is None
    with seen:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert seen.lse(q) is None, "two calls: which one is the main pass?"


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_seen_statistics_do_not_change_what_the_ops_compute(backend: str) -> None:
    if available_backends()[backend] is not None:
        pytest.skip(available_backends()[backend])
    q, k, v = _inputs()
    with Watch() as seen:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rows = QueryRows.causal(torch.tensor([0, 0, 1]), torch.tensor([40, 3, 17]))
    given = rows.take(seen.lse(q)[..., None])[..., 0]
    columns = torch.arange(2, 30, dtype=torch.int32).repeat(2, 1)
    at = rows.take(q)
    for options in ({}, {"lse": given}):
        side = side_attention(at, k, v, rows, backend=backend, **options)
        maps = attention_map(at, k, rows, columns, over="visible", backend=backend, **options)
        if not options:
            expected = (*side, maps)
    for a, b in zip((*side, maps), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _kernel(change) -> lse.Run:
    def run(q, k, v, scale):
        out, found = lse.KERNELS["aten_flash_cpu"](q, k, v, scale)
        return out, change(found)

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x / torch.tensor(2.0).log(), "base 2 and not e"),
        (lambda x: x.transpose(1, 2), r"shape \[2, 37, 4\] and not \[B, Hq, S\]"),
        (lambda x: x.flatten(0, 1), r"shape \[8, 37\]"),
        (lambda x: x.bfloat16(), "is torch.bfloat16 and not torch.float32"),
        (lambda x: x + 0.1, "not that of its scores"),
        (lambda x: x.roll(1, 2), "not that of its scores"),
        (lambda x: x[..., :5], r"shape \[2, 4, 5\]"),
    ],
)
def test_statistics_of_another_kind_are_refused_loudly(change, message, monkeypatch) -> None:
    monkeypatch.setitem(lse.KERNELS, "odd", _kernel(change))
    with pytest.raises(RuntimeError, match=message):
        self_test("odd", "cpu", torch.float32)
    monkeypatch.setitem(lse.OPS, "aten::_scaled_dot_product_flash_attention_for_cpu", "odd")
    q, k, v = _inputs()
    with Watch() as seen:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with pytest.raises(RuntimeError, match=message):
        seen.lse(q)


def _cudnn(asked: bool = True):
    """A CPU stand-in for cuDNN's op, which runs on CUDA alone: its layout is [B, Hq, S, 1], and it
    returns no statistics unless asked to."""

    def run(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, debug=False, *,
            scale=None):  # fmt: skip
        out, found = lse.KERNELS["aten_flash_cpu"](q, k, v, scale)
        statistics = found[..., None] if compute_log_sumexp and asked else None
        empty = torch.empty(0)
        return out, statistics, empty, empty, 0, 0, empty, empty, empty

    return run


@pytest.mark.parametrize("asked", [True, False])
def test_cudnn_statistics_are_seen_in_their_layout(asked: bool) -> None:
    """torch >= 2.11 runs this op by default on Hopper; without gradients it returns none."""
    library = torch.library.Library("aten", "IMPL")
    q, k, v = _inputs(torch.bfloat16)
    k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("_scaled_dot_product_cudnn_attention", _cudnn(asked), "CPU")
    try:
        with Watch() as seen, torch.no_grad():
            torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, is_causal=True)
        found = seen.lse(q)
        if not asked:
            assert found is None
            return
        torch.testing.assert_close(found.double(), _truth(q, k, 32**-0.5), rtol=1e-5, atol=1e-4)
        _, found = attention(q, k[:, ::3], v[:, ::3], kernel="aten_cudnn")
        torch.testing.assert_close(found.double(), _truth(q, k, 32**-0.5), rtol=1e-5, atol=1e-4)
    finally:
        library._destroy()


def test_a_kernel_that_cannot_be_tested_is_not_trusted(monkeypatch) -> None:
    """If the self-test fails to run, the main pass goes on and its statistics are not used."""

    def crash(q, k, v, scale):
        raise RuntimeError("cuDNN Frontend error: no valid engine")

    monkeypatch.setitem(lse.KERNELS, "odd", crash)
    monkeypatch.setitem(lse.OPS, "aten::_scaled_dot_product_flash_attention_for_cpu", "odd")
    q, k, v = _inputs()
    for told in (True, False):
        with Watch() as seen:
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert seen.lse(q) is None
        assert [("no valid engine" in str(w.message)) for w in caught] == [True] * told
    with pytest.raises(lse.CannotRun, match=r"odd does not run on cpu in torch\.float32"):
        self_test("odd", "cpu", torch.float32)


def test_padded_statistics_are_cut() -> None:
    """As the memory-efficient kernel pads S to 32."""
    q, k, v = _inputs()
    lse.KERNELS["padded"] = _kernel(lambda x: F.pad(x, (0, 23)))
    try:
        _, found = attention(q, k, v, kernel="padded")
    finally:
        del lse.KERNELS["padded"]
    assert found.shape == q.shape[:3]


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(
    ("kernel", "package"),
    [("flash_attn_2", "flash_attn"), ("flash_attn_3", "flash_attn_interface")],
)
def test_flash_attention_is_called_as_it_documents(kernel, package, always, monkeypatch) -> None:
    """A stand-in made of torch, with its convention: [B, S, H, D] and (out, lse, ...)."""

    def compute(q, k, v, softmax_scale, causal):
        assert causal
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, found = lse.KERNELS["aten_flash_cpu"](q, k, v, softmax_scale)
        return out.transpose(1, 2), found

    def two(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        out, found = compute(q, k, v, softmax_scale, causal)
        return (out, found, None) if return_attn_probs else out

    def early_three(q, k, v, softmax_scale=None, causal=False):
        return compute(q, k, v, softmax_scale, causal)

    module = ModuleType(package)
    module.flash_attn_func = early_three if always else two
    monkeypatch.setitem(sys.modules, package, module)
    q, k, v = _inputs()
    out, found = attention(q, k, v, kernel=kernel)
    expected = attention(q, k, v, kernel="aten_flash_cpu")
    torch.testing.assert_close((out, found), expected)


def test_a_missing_package_and_an_unknown_kernel_are_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    q, k, v = _inputs()
    with pytest.raises(ValueError, match="`kernel`: flash_attn is not importable here"):
        attention(q, k, v, kernel="flash_attn_2")
    with pytest.raises(ValueError, match=r"`kernel`: expected aten_flash \| .*, got xformers"):
        attention(q, k, v, kernel="xformers")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", lse.KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_of_this_device(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "aten_flash_cpu":
        pytest.skip("runs on CPU only")
    q, k, v = (torch.randn(2, h, 1000, 128, device="cuda").to(dtype) for h in (28, 4, 4))
    try:
        _, found = attention(q, k, v, kernel=kernel)
    except (ValueError, lse.CannotRun) as error:
        pytest.skip(str(error))
    truth = _truth(q.cpu(), k.cpu(), 128**-0.5)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_torch_chooses_is_seen(dtype: torch.dtype) -> None:
    """It differs between versions and devices: cuDNN's on Hopper since torch 2.11."""
    shapes = ((2, 28, 1024, 128), (2, 4, 1024, 128), (2, 4, 1024, 128))
    q, k, v = (torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in shapes)
    with Watch() as seen:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = seen.lse(q)
    assert found is not None, [name for name, *_ in seen._seen]
    truth = _truth(q.detach().cpu(), k.detach().cpu(), 128**-0.5)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-4, atol=1e-3)
