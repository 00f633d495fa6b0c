"""groundkern.compat: signatures, what is refused, and what no suite of theirs looks at."""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F

from groundkern.compat import cut_cross_entropy, liger
from groundkern.compat.torch import linear_cross_entropy as torch_ce
from tests.peers.signatures import SIGNATURES
from tests.sources import ROOT, files

cce, fused = cut_cross_entropy.linear_cross_entropy, liger.liger_fused_linear_cross_entropy


def described(function: Callable) -> tuple:
    found, keyword = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword:
            found, keyword = [*found, "*"], True
        default = p.default.name if isinstance(p.default, enum.Enum) else p.default
        found.append(p.name if default is p.empty else (p.name, default))
    return tuple(found)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_theirs(name: str) -> None:
    module, _, path = name.partition(".")
    function = attrgetter(path)(importlib.import_module(f"groundkern.compat.{module}"))
    assert described(function) == SIGNATURES[name]


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="since torch 2.13")
def test_torch_has_that_signature() -> None:
    assert described(F.linear_cross_entropy) == SIGNATURES["torch.linear_cross_entropy"]


def test_none_of_them_is_imported() -> None:
    """Nor by a fresh process that imports the adapters."""
    theirs = {"liger_kernel", "cut_cross_entropy", "quack", "transformers", "trl"}
    for path in files(".py"):
        if "compat" in path.parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert not {name.split(".")[0] for name in names} & theirs
    program = "from groundkern.compat import cut_cross_entropy, liger, torch; import sys\n"
    program += f"print(sorted({theirs} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


X, W, TARGET = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)
SHARD = cut_cross_entropy.VocabParallelOptions(0, 11, reduce_e_grad=False)


@pytest.mark.parametrize(
    ("call", "options", "name"),
    [
        (torch_ce, {"reduction": "batchmean"}, "reduction"),
        (torch_ce, {"options": {"batch_chunk_size": 2}}, "options"),
        (torch_ce, {"weight": torch.ones(11, requires_grad=True)}, "weight"),
        (torch_ce, {"weight": torch.ones(11, dtype=torch.int64)}, "weight"),
        (torch_ce, {"target": TARGET.int()}, "target"),
        (torch_ce, {"target": torch.rand(6, 11, requires_grad=True)}, "target"),
        (torch_ce, {"linear_weight": W.double()}, "linear_weight"),
        (torch_ce, {"label_smoothing": -0.1}, "label_smoothing"),
        (fused, {"reduction": "batchmean"}, "reduction"),
        (fused, {"accum_dtype": "float32"}, "accum_dtype"),
        (fused, {"accum_dtype": torch.int32}, "accum_dtype"),
        (fused, {"softcap": 0.0}, "softcap"),
        (fused, {"lse_square_scale": -1e-4}, "lse_square_scale"),
        (fused, {"label_smoothing": 1.1}, "label_smoothing"),
        (fused, {"return_z_loss": 1}, "return_z_loss"),
        (fused, {"use_token_scaling": None}, "use_token_scaling"),
        (fused, {"ce_weight": torch.ones(10)}, "ce_weight"),
        (fused, {"bias": torch.ones(10)}, "bias"),
        (fused, {"target": TARGET[:5]}, "target"),
        (cce, {"reduction": "batchmean"}, "reduction"),
        (cce, {"filter_eps": "high"}, "filter_eps"),
        (cce, {"filter_eps": 1}, "filter_eps"),
        (cce, {"impl": "triton"}, "impl"),
        (cce, {"impl": None}, "impl"),
        (cce, {"shift": 6}, "shift"),
        (cce, {"shift": -1}, "shift"),
        (cce, {"shift": 1.0}, "shift"),
        (cce, {"accum_e_fp32": "yes"}, "accum_e_fp32"),
        (cce, {"c": W.double()}, "c"),
        (cce, {"softcap": -20.0}, "softcap"),
        (cce, {"vocab_parallel_options": SHARD}, "vocab_parallel_options"),
        (cce, {"c": W[:5], "vocab_parallel_options": SHARD}, "vocab_parallel_options"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(call, options: dict, name: str) -> None:
    arguments = dict(zip(inspect.signature(call).parameters, (X, W, TARGET)))
    with pytest.raises((ValueError, TypeError), match=f"^`{name}`: expected .*, got "):
        call(**{**arguments, **options})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"jsd_beta": 1.1}, "jsd_beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"accum_dtype": 32}, "accum_dtype"),
        ({"shift_labels": TARGET[:5]}, "shift_labels"),
        ({"shift_labels": TARGET.float()}, "shift_labels"),
        ({"student_weight": W[:, :7]}, "student_weight"),
        ({"teacher_input": X[:5]}, "teacher_input"),
        ({"teacher_weight": W[:10]}, "teacher_weight"),
    ],
)
def test_what_ligers_divergence_refuses(options: dict, name: str) -> None:
    arguments = {"student_input": X, "student_weight": W, "teacher_input": X, "teacher_weight": W}
    with pytest.raises((ValueError, TypeError), match=f"^`{name}`: expected .*, got "):
        liger.liger_fused_linear_jsd(**{**arguments, **options})


@pytest.mark.parametrize("module", [liger.LigerFusedLinearCrossEntropyLoss])
@pytest.mark.parametrize("options", [{"reduction": "x"}, {"softcap": 0.0}, {"accum_dtype": 32}])
def test_a_module_refuses_when_it_is_made(module, options: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^`{next(iter(options))}`"):
        module(**options)


def test_the_module_of_cut_cross_entropy_is_the_function() -> None:
    options = {"softcap": 5.0, "reduction": "none", "shift": 1, "impl": "cce_exact"}
    e, targets = X.view(2, 3, 8), TARGET.view(2, 3)
    module = cut_cross_entropy.LinearCrossEntropy(return_lse=True, **options)
    for a, b in zip(module(e, W, targets), cce(e, W, targets, return_lse=True, **options)):
        assert a.shape == (2, 2) and torch.equal(a, b)


def test_another_enumeration_names_an_implementation() -> None:
    """That of cut-cross-entropy itself, for one."""
    theirs = enum.IntEnum("LinearCrossEntropyImpl", ["CCE", "TORCH_COMPILE"])
    assert torch.equal(cce(X, W, TARGET, impl=theirs.TORCH_COMPILE), cce(X, W, TARGET))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_are_all_ignored(reduction: str) -> None:
    """A mean over no rows is NaN for torch and cut-cross-entropy and 0 for Liger; no gradient."""
    ignored = torch.full((6,), -100)
    mean = torch.nan if reduction == "mean" else 0.0
    for call, expected in ((torch_ce, mean), (cce, mean), (fused, 0.0)):
        x = X.clone().requires_grad_()
        loss = call(x, W, ignored, reduction=reduction)
        assert torch.equal(loss.nan_to_num(7.0), torch.full_like(loss, expected).nan_to_num(7.0))
        loss.sum().backward()
        assert (x.grad == 0).all()
    loss, lse = cce(X, W, ignored, reduction=reduction, return_lse=True)
    assert (lse == 0).all()
    assert bool(loss.isnan().all()) == (reduction == "mean")
    every = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    weight = torch.ones(11)
    result = fused(X, W, ignored, None, weight, -100, 1e-4, 0.1, reduction, **every)
    assert (result.loss == 0).all() and (result.z_loss == 0).all()
    assert (result.predicted_tokens == -1).all()
    assert bool(result.token_accuracy.isnan().all()) == (reduction != "none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ligers_divisors(reduction: str) -> None:
    """Class weights divide the cross entropy of a mean, rows its z loss; also beside weights below
    0, token scaling and smoothing at once."""
    target = torch.tensor([3, 0, -100, 7, 7, 10])
    c = torch.linspace(-0.5, 2.0, 11)
    for scaling in (False, True):
        result = fused(X, W, target, None, c, -100, 1e-2, 0.1, reduction, 9.0, True, None, scaling)
        z = 9.0 * torch.tanh(X @ W.T / 9.0)
        options = {"label_smoothing": 0.1, "reduction": "none"}
        rows, z_rows = F.cross_entropy(z, target, c, **options), 1e-2 * z.logsumexp(-1) ** 2
        counted = target != -100
        p = z.softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0] if scaling else 1.0
        divisors = (c[target[counted]].sum(), 5) if reduction == "mean" else (1, 1)
        parts = [x * counted * p / by for x, by in zip((rows, z_rows), divisors)]
        parts = parts if reduction == "none" else [x.sum() for x in parts]
        torch.testing.assert_close(result.loss, parts[0] + parts[1])
        torch.testing.assert_close(result.z_loss, parts[1])


def test_an_untouched_option_changes_no_bit() -> None:
    """Options without effect."""
    for options in ({"filter_eps": None}, {"filter_eps": 0.1}, {"accum_c_fp32": True}):
        assert torch.equal(cce(X, W, TARGET, **options), cce(X, W, TARGET))
    assert torch.equal(fused(X, W, TARGET, accum_dtype=torch.bfloat16), fused(X, W, TARGET))


def test_dtypes_of_the_results() -> None:
    """torch's in input's dtype, but fp32 under autocast; the others' in fp32, Liger's z loss in
    input's."""
    x, w = X.bfloat16(), W.bfloat16()
    assert torch_ce(x, w, TARGET).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_ce(X, W, TARGET).dtype == torch.float32
        assert cce(X, W, TARGET).dtype == torch.float32
    result = fused(x, w, TARGET, return_z_loss=True, return_token_accuracy=True)
    dtypes = result.loss.dtype, result.z_loss.dtype, result.token_accuracy.dtype
    assert dtypes == (torch.float32, torch.bfloat16, torch.float32)
    assert cce(x, w, TARGET).dtype == torch.float32


def test_they_compile() -> None:
    """In one graph each, with the values of eager."""
    class_weight = torch.rand(11)

    def all_of_them(x, w, target):
        three = x.view(2, 3, 8)
        yield torch_ce(x, w, target, weight=class_weight, label_smoothing=0.1)
        yield fused(x, w, target, None, class_weight, lse_square_scale=1e-3, return_z_loss=True)[0]
        yield cce(three, w, target.view(2, 3), shift=1)
        yield cce(three, w, target.view(2, 3), shift=1, return_lse=True)[1]

    def losses(x, w, target):
        return tuple(all_of_them(x, w, target))

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(X, W, TARGET), losses(X, W, TARGET), strict=True):
        torch.testing.assert_close(a, b)
