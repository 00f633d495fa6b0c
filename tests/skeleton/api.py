"""The public function `scaled_rows`."""

from torch import Tensor

from groundkern import backends, checks
from groundkern.precision import accumulation_dtype, autocast
from tests.skeleton import Inputs, Options, op


def scaled_rows(
    x: Tensor, factor: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Every row times its factor.

    Equals `scale * factor[:, None] * x`.

    Args:
        x: [N, D]. fp32, bf16, fp16 (fp64 in the reference).
        factor: [N] fp32 (fp64 with fp64).
        scale: of all rows; default 1.
        backend: "auto" | "reference" | "triton" | "native".

    Returns:
        [N, D] in x's dtype, differentiable in x and factor.

    Raises:
        ValueError: mismatched shapes or devices, a scale that is not positive, a backend that
            cannot serve the call.
        TypeError: mismatched dtypes.
    """
    (x,) = autocast(x)
    sizes: dict[str, int] = {}
    checks.tensor("x", x, "N D", sizes, dtype=checks.FLOATS)
    wide = accumulation_dtype(x.dtype)
    checks.tensor("factor", factor, "N", sizes, dtype=wide, device=x.device)
    checks.finite_positive("scale", scale)
    inputs, options = Inputs(x, factor), Options(scale or 1.0)
    name = backends.choose(backend, x.device, lambda b: op.kernels(b).unsupported(inputs))
    return op.scaled_rows(*inputs, *options, name)
