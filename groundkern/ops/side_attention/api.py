"""The public function `side_attention`."""

from typing import NamedTuple

from torch import Tensor

from groundkern import backends, checks, together
from groundkern.calls import Call, called
from groundkern.ops.side_attention import Inputs, Options, op
from groundkern.precision import accumulation_dtype, autocast
from groundkern.selection import KeySets, QueryRows, check_selection
from groundkern.together import Asked


class SideAttention(NamedTuple):
    """out [N, Hq, Dv] in q's dtype; lse [N, Hq] fp32, natural log. Both carry gradient."""

    out: Tensor
    lse: Tensor


def side_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: QueryRows,
    *,
    allowed: KeySets | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> SideAttention:
    """Attention of a few query rows over an allowed subset of their visible keys, with its
    log-sum-exp.

    Equals, per row with `mask = visible & allowed`,
    `F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)`, without the mask,
    the repeated keys or the probabilities in memory. `exp(lse_out - lse_main)` is the row's region
    mass.

    Args:
        q: [N, Hq, D] queries, after RoPE and q-norm. fp32, bf16, fp16 (fp64 in the reference).
        k: [B, Hkv, S, D] keys, any strides with a contiguous last dimension; Hq is a multiple of
            Hkv.
        v: [B, Hkv, S, Dv] values; Dv need not equal D.
        rows: the N query rows, sorted by sequence.
        allowed: key sets that restrict rows further; None: all visible keys.
        lse: [N, Hq] fp32, natural log: the main pass's statistics over all visible keys, used only
            as the softmax shift. Carries no gradient and never changes the result.
        scale: of the scores; default D ** -0.5.
        softcap: `s = softcap * tanh(s / softcap)`; None: off.
        backend: "auto" | "reference" | "triton" | "native".

    Returns:
        SideAttention(out, lse), both differentiable in q, k and v. A row with no allowed key has
        out 0, lse -inf and no gradient.

    Raises:
        ValueError: mismatched shapes, rows or sets out of range, a backend that cannot serve the
            call.
        TypeError: mismatched dtypes.

    Source: SMAM (CVPR 2026), equation (S1).
    """
    call = asked(q, k, v, rows, allowed, lse, Wanted(scale, softcap, backend))
    ((out, statistics),) = together.run([call])
    return SideAttention(out, statistics)


class Wanted(NamedTuple):
    """Options as the caller gives them."""

    scale: float | None = None
    softcap: float | None = None
    backend: str = "auto"


def asked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: QueryRows,
    allowed: KeySets | None,
    lse: Tensor | None,
    wanted: Wanted,
) -> Asked:
    """A call of `side_attention`, checked and ready to run."""
    (q, k, v), (scale, softcap, backend) = autocast(q, k, v), wanted
    if lse is not None and lse.requires_grad:  # else it stays itself, see `together.Repeated`
        lse = lse.detach()
    inputs = Inputs(q, k, v, lse)

    def make() -> Call:
        sizes = _checked(inputs, rows, allowed)
        checks.finite_positive("scale", scale)
        checks.finite_positive("softcap", softcap)
        found = Options(scale or sizes["D"] ** -0.5, softcap or 0.0)
        name = backends.choose(backend, q.device, lambda b: op.kernels(b).unsupported(inputs))
        return op.call(name, inputs, rows, allowed, found)

    call, direct = called(rows, (allowed,), inputs, ("side_attention", wanted), make)
    return Asked(op, call, inputs, direct)


def _checked(inputs: Inputs, rows: QueryRows, allowed: KeySets | None) -> dict[str, int]:
    """The sizes of a call, which is refused if they do not agree."""
    q, k, v, lse = inputs
    sizes: dict[str, int] = {}
    checks.tensor("q", q, "N Hq D", sizes, dtype=checks.FLOATS)
    checks.tensor("k", k, "B Hkv S D", sizes, dtype=q.dtype, device=q.device)
    checks.tensor("v", v, "B Hkv S Dv", sizes, dtype=q.dtype, device=q.device)
    check_selection(rows, allowed, sizes, q.device)
    if lse is not None:
        wide = accumulation_dtype(q.dtype)
        checks.tensor("lse", lse, "N Hq", sizes, dtype=wide, device=q.device)
    return sizes
