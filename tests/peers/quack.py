"""QuACK 0.6.4, tests/test_linear_cross_entropy.py: 110 cases.

Its function is ours with fewer options, so `groundkern.linear_cross_entropy` is called.
`chunk_size` and `use_scaled_exp` say how QuACK computes: one call of ours stands for each of their
values. Its rule: the largest error against fp32 is below 3 times (loss) or twice (gradients) that
of plain torch in bf16, plus a tolerance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern import linear_cross_entropy
from tests.peers.case import Values, assert_allclose, assert_largest, gradients, grid, leaves

SUITE = "QuACK linear cross entropy"
BOTH = [False, True]
REDUCTIONS = ["mean", "sum"]


def small(values: Values) -> Values:
    size, dim = min(values["V"], 512 + values["V"] % 1000), min(values["d"], 96)
    return {**values, "V": size, "d": dim, "B_L": min(values["B_L"], 96)}


def _draw(v: Values) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 x [N, d] and weight [V, d], target [N]."""
    x = torch.randn(v["B_L"], v["d"], dtype=torch.bfloat16) * 0.1
    weight = torch.randn(v["V"], v["d"], dtype=torch.bfloat16) / v["d"] ** 0.5
    target = torch.randint(0, v["V"], (v["B_L"],))
    return x, weight, target


def _compare(x: Tensor, weight: Tensor, target: Tensor, **options) -> None:
    ours, theirs, wide = leaves(x, weight), leaves(x, weight), leaves(x.float(), weight.float())
    loss = linear_cross_entropy(*ours, target, **options).loss
    plain, exact = (F.cross_entropy(F.linear(*side), target, **options) for side in (theirs, wide))
    assert_largest("loss", loss, plain, exact, 3, 1e-5)
    sides = (gradients(y, *z) for y, z in ((loss, ours), (plain, theirs), (exact, wide)))
    for name, a, b, truth in zip(("dx", "dweight"), *sides):
        assert_largest(name, a, b, truth, 2, 1e-4)


def check(v: Values) -> None:
    _compare(*_draw(v), reduction=v["reduction"])


def check_some_ignored(v: Values) -> None:
    x, weight, target = _draw(v)
    ignore_index = v["V"] - 1 if v["last"] else -100
    target[torch.rand(v["B_L"]) < v["share"]] = ignore_index
    _compare(x, weight, target, reduction=v["reduction"], ignore_index=ignore_index)


def check_batched(v: Values) -> None:
    """[B, L, d] rows: gradients keep their shape."""
    batch, length, dim = v["B L d"]
    x = torch.randn(batch, length, dim, dtype=torch.bfloat16) * 0.1
    weight = torch.randn(v["V"], dim, dtype=torch.bfloat16) / dim**0.5
    target = torch.randint(0, v["V"], (batch, length))
    ours, wide = leaves(x, weight), leaves(x.float(), weight.float())
    loss = linear_cross_entropy(*ours, target).loss
    exact = F.cross_entropy(F.linear(*wide).flatten(0, 1), target.flatten())
    assert_allclose("loss", loss, exact, 1e-5, 1e-3)
    for name, a, b in zip(("dx", "dweight"), gradients(loss, *ours), gradients(exact, *wide)):
        assert_allclose(name, a, b, 1e-2, 0.0)


def check_compiled(v: Values) -> None:
    """The same bits compiled as eager; every seventh row is ignored."""
    x, weight, target = _draw(v)
    target[::7] = -100

    def loss(x: Tensor, weight: Tensor, reduction: str) -> Tensor:
        return linear_cross_entropy(x, weight, target, reduction=reduction).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for reduction in ("sum", "mean"):
        eager, other = leaves(x, weight), leaves(x, weight)
        results = loss(*eager, reduction), compiled(*other, reduction)
        assert_allclose("loss", *results, 1e-6, 1e-6)
        pairs = zip(gradients(results[0], *eager), gradients(results[1], *other))
        assert all(torch.equal(a, b) for a, b in pairs)


def check_no_grad(v: Values) -> None:
    x, weight, target = _draw(v)
    trained = linear_cross_entropy(*leaves(x, weight), target, reduction=v["reduction"]).loss
    with torch.no_grad():
        loss = linear_cross_entropy(*leaves(x, weight), target, reduction=v["reduction"]).loss
    assert not loss.requires_grad
    assert_allclose("loss", loss, trained, 1e-5, 1e-5)


def check_frozen(v: Values) -> None:
    """A frozen operand gets no gradient, and the other the one it has with both."""
    x, weight, target = _draw(v)
    both, one = leaves(x, weight), leaves(x, weight)
    frozen = 0 if v["frozen"] == "x" else 1
    one[frozen].requires_grad_(False)
    for side in (both, one):
        linear_cross_entropy(*side, target).loss.backward()
    assert one[frozen].grad is None
    assert_allclose("gradient", one[1 - frozen].grad, both[1 - frozen].grad, 1e-5, 1e-3)


HEAD = {"V": 2048, "d": 512, "B_L": 1024}
CHUNKS = {"chunk_size": [256, 1024], "use_scaled_exp": BOTH}
CASES = [
    *grid(
        SUITE,
        "test_chunked_linear_cross_entropy",
        check,
        {
            "reduction": REDUCTIONS,
            "V": [32000, 50264, 128256],
            "d": [768, 1024],
            "B_L": [8, 16, 24],
        },
        small,
    ),
    *grid(
        SUITE,
        "test_scaled_exp_linear_cross_entropy",
        check_some_ignored,
        {
            "use_scaled_exp": BOTH,
            "reduction": REDUCTIONS,
            "V": [1536, 2048],
            "d": [512, 768],
            "B_L": [128, 600, 1024],
        },
        small,
        share=0.15,
        last=False,
    ),
    *grid(
        SUITE,
        "test_scaled_exp_linear_cross_entropy_batched",
        check_batched,
        {},
        seed=2,
        V=1536,
        **{"B L d": (3, 100, 768)},
    ),
    *grid(
        SUITE,
        "test_chunked_linear_cross_entropy_torch_compile_dispatch",
        check_compiled,
        {},
        small,
        seed=3,
        **{**HEAD, "B_L": 256},
    ),
    *grid(
        SUITE,
        "test_chunked_linear_cross_entropy_ignore_index",
        check_some_ignored,
        {"reduction": REDUCTIONS, **CHUNKS},
        small,
        seed=42,
        share=0.2,
        last=True,
        **HEAD,
    ),
    *grid(
        SUITE,
        "test_chunked_linear_cross_entropy_no_grad",
        check_no_grad,
        {"reduction": REDUCTIONS, **CHUNKS},
        small,
        **HEAD,
    ),
    *grid(
        SUITE,
        "test_chunked_linear_cross_entropy_partial_grad",
        check_frozen,
        {"frozen": ["x", "weight"], **CHUNKS},
        small,
        **HEAD,
    ),
]
