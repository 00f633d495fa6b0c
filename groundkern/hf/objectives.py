"""What to train beside the text loss: one frozen dataclass per method, with the papers' weights."""

from __future__ import annotations

from dataclasses import dataclass

from groundkern.checks import fail, require

OVER = ("columns", "visible")
HEADS = ("mean", "each")


def _weight(name: str, value: float) -> None:
    require(0.0 <= value < float("inf"), name, "a finite number >= 0", value)


@dataclass(frozen=True)
class Smam:
    """SMAM / PGA-SFT (METHODS.md section 1): `weight * (gamma * L_G + alpha * L_CE+)`.

    Args:
        weight: factor on both terms.
        beta, alpha, gamma: (S4), (S5); gamma 2.0 for LLaVA, 0.5 for Qwen.
        detach_reference: stop the gradient of (S4) towards pi+.
    """

    weight: float = 1.0
    beta: float = 0.1
    alpha: float = 0.1
    gamma: float = 2.0
    detach_reference: bool = False

    def __post_init__(self) -> None:
        for name in ("weight", "beta", "alpha", "gamma"):
            _weight(name, getattr(self, name))


@dataclass(frozen=True)
class DvSft:
    """DV-SFT (METHODS.md section 2): `weight * L_v`, smoothed over the image's other labels.

    Args:
        weight: lambda of (D4).
        smoothing: b of (D3).
    """

    weight: float = 2e-3
    smoothing: float = 0.3

    def __post_init__(self) -> None:
        _weight("weight", self.weight)
        require(0.0 <= self.smoothing < 1.0, "smoothing", "a number in [0, 1)", self.smoothing)


@dataclass(frozen=True)
class Klal:
    """KLAL (METHODS.md section 3): `weight * mean over rows and layers of KL(target || map)`.

    Args:
        weight: lambda of (K4).
        over: "columns" normalises over the row's image (K1), "visible" over all visible keys.
        heads: "mean" is KL to the head mean (K2), "each" the mean over heads of each head's KL.
        layers: the decoder layers that count; None: all.
    """

    weight: float = 1.0
    over: str = "columns"
    heads: str = "mean"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _weight("weight", self.weight)
        if self.over not in OVER:
            fail("over", " or ".join(OVER), self.over)
        if self.heads not in HEADS:
            fail("heads", " or ".join(HEADS), self.heads)
        layers = self.layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            fail("layers", "distinct layer numbers in ascending order, or None", layers)


@dataclass(frozen=True)
class Objectives:
    """Everything `attach` was asked for."""

    smam: Smam | None = None
    dv_sft: DvSft | None = None
    klal: Klal | None = None
    backend: str = "auto"
