"""Liger-Kernel 0.8.2, test/transformers/test_fused_linear_scaled_cross_entropy.py: the 7 cases that
compute something.

Its function returns -log p of a row's label and, if asked, the row's entropy, of logits divided by
a temperature: `groundkern.linear_log_prob`. Its chunk size has no counterpart.
"""

import torch

from groundkern import linear_log_prob
from tests.peers.case import FLOATS, Values, assert_allclose, gradients, grid, leaves

SUITE = "Liger fused linear scaled cross entropy"


def small(values: Values) -> Values:
    return {**values, "N D V": (33, 64, 1031)} if values["N D V"][2] > 10_000 else values


def check(v: Values) -> None:
    """Gradients are those of both results, or of the one that `upstream` names."""
    (count, dim, size), dtype = v["N D V"], FLOATS[v["dtype"]]
    target = torch.randint(size, (count,))
    if v["every"]:
        target[:: v["every"]] = -100
    x = (torch.randn(count, dim) * v["scale"]).to(dtype)
    weight = (torch.randn(size, dim) / (dim**0.5 if v["scale"] < 1 else 1)).to(dtype)
    ours, theirs = leaves(x, weight), leaves(x, weight)
    entropy = v["upstream"] != "nll alone"
    rows = linear_log_prob(*ours, target, temperature=v["temperature"], entropy=entropy)
    log_probs = ((theirs[0] @ theirs[1].T).float() / v["temperature"]).log_softmax(-1)
    counted = target != -100
    nll = -log_probs.gather(1, target.clamp(min=0)[:, None])[:, 0] * counted
    expected = {"nll": nll, "entropy": -(log_probs.exp() * log_probs).sum(-1) * counted}
    results = {"nll": -rows.log_prob, "entropy": rows.entropy}
    assert (rows.entropy is not None) == entropy
    wanted = [name for name in expected if name in v["upstream"]]
    upstream = {name: torch.randn(count) for name in wanted}
    sides = []
    for side, operands in ((results, ours), (expected, theirs)):
        total = sum((side[name] * upstream[name]).sum() for name in wanted)
        sides.append(gradients(total, *operands))
    for name in wanted:
        assert_allclose(name, results[name], expected[name], v["atol"], v["rtol"])
    for name, a, b in zip(("dx", "dweight"), *sides):
        assert_allclose(name, a, b, v["gradient"], v["gradient_rtol"])


def _case(test: str, shape: tuple, upstream: str, **values) -> list:
    defaults = {"dtype": "fp32", "temperature": 1.0, "every": 0, "scale": 1.0, "seed": 42}
    defaults |= {"atol": 1e-5, "rtol": 1.3e-6, "gradient": 2e-5, "gradient_rtol": 2e-5}
    values = {**defaults, **values, "N D V": shape, "upstream": upstream}
    return grid(SUITE, test, check, {}, small, **values)


FALLBACK, CUTILE = "test_frontend_fallback", "test_cutile"
EXACT = {"scale": 0.25, "atol": 6e-5, "rtol": 6e-5, "gradient": 6e-5, "gradient_rtol": 6e-5}
COARSE = {"scale": 0.25, "atol": 8e-2, "rtol": 5e-2, "gradient": 8e-2, "gradient_rtol": 5e-2}
COMBINED = f"{CUTILE}_matches_verl_fallback_forward_and_combined_backward"
SINGLE = {**EXACT, "temperature": 1.2, "every": 5, "seed": 43}
CASES = [
    *_case(
        f"{FALLBACK}_matches_torch_with_entropy_and_ignored_rows",
        (521, 7, 13),
        "nll and entropy",
        temperature=0.7,
        every=11,
    ),
    *_case(f"{FALLBACK}_returns_only_nll_when_entropy_is_disabled", (4, 8, 16), "nll alone"),
    *_case(f"{FALLBACK}_supports_entropy_only_backward", (6, 8, 16), "entropy"),
    *_case(COMBINED, (17, 31, 257), "nll and entropy", temperature=0.8, every=11, **EXACT),
    *_case(
        COMBINED,
        (1025, 64, 131072),
        "nll and entropy",
        dtype="bf16",
        temperature=0.8,
        every=11,
        **COARSE,
    ),
    *_case(f"{CUTILE}_supports_single_output_backward", (19, 33, 259), "nll", **SINGLE),
    *_case(f"{CUTILE}_supports_single_output_backward", (19, 33, 259), "entropy", **SINGLE),
]
