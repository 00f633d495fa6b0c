"""From what was measured on samples to an order of heads, the best first (K7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundkern.trainer.config import ConfigError
from groundkern.trainer.metrics.intervals import Interval, interval

FIRST_LAYER = 2  # of those that localise: the first two are left out
LEAST = 10  # heads of least entropy in a sample
Pair = tuple[int, int]


@dataclass(frozen=True)
class Ranking:
    """The heads of a model in order.

    Args:
        layers: the decoder's numbers of the L layers that were measured.
        figures: means over samples by name, [L, H] each.
        scores: [L, H], the figure that orders them.
        chosen: the best pairs of a layer's number and a head.
        intervals: of each chosen pair's score.
        chance: the share of the image's tokens that is on the target, mean over samples.
        elbow: of entropy: the image mass from which a head was considered; None: another score.
    """

    layers: tuple[int, ...]
    figures: dict[str, NDArray]
    scores: NDArray
    chosen: list[Pair]
    intervals: list[Interval]
    chance: float
    elbow: float | None = None


def ranked(
    samples: Sequence[dict[str, NDArray]], layers: Sequence[int], score: str, top: int
) -> Ranking:
    """Order heads by a score, the mean over samples of equal weight.

    Args:
        samples: the figures of each, of `HeadMeasure`.
        layers: the decoder's numbers of the layers that were measured.
        score: "share", "hits", "mass" or "entropy".
        top: heads to choose.

    Raises:
        ConfigError: more than there are, or than the score can order.
    """
    names = [name for name in samples[0] if name not in ("chance", "entropy")]
    stacked = {name: np.stack([sample[name] for sample in samples]) for name in names}
    elbow = None
    if score == "entropy":
        elbow, stacked["entropy"] = _least_scattered(samples, stacked["mass"], layers)
    every = stacked[score]  # [N, L, H]
    means = {name: values.mean(0) for name, values in stacked.items()}
    scores = means[score]
    order = np.argsort(-scores, axis=None, kind="stable")
    if score == "entropy":
        order = order[scores.ravel()[order] > 0]
    if top > len(order):
        wanted = f"at most {len(order)}, the heads that {score} ranks here"
        raise ConfigError(f"--top: expected {wanted}, got {top}")
    places = [np.unravel_index(at, scores.shape) for at in order[:top]]
    return Ranking(
        tuple(layers),
        means,
        scores,
        [(layers[layer], int(head)) for layer, head in places],
        [interval(every[:, layer, head]) for layer, head in places],
        float(np.mean([sample["chance"] for sample in samples])),
        elbow,
    )


def _least_scattered(
    samples: Sequence[dict[str, NDArray]], mass: NDArray, layers: Sequence[int]
) -> tuple[float, NDArray]:
    """The elbow of the image mass, and [N, L, H]: 1 where a head is among the `LEAST` of least
    spatial entropy in a sample, of those above the elbow and behind the first layers.

    Source: arXiv 2503.06287.
    """
    mean, late = mass.mean(0), np.asarray(layers) >= FIRST_LAYER
    if not late.any():
        raise ConfigError(
            f"--score: expected layers behind the first {FIRST_LAYER} for entropy, which leaves "
            f"these out, got layers {', '.join(map(str, layers))}"
        )
    least = elbow(mean.ravel())
    kept = ((mean >= least) & late[:, None]).ravel()
    if not kept.any():
        raise ConfigError(
            f"--score: expected a head behind layer {FIRST_LAYER - 1} for entropy with {least:.3f} "
            "or more of its attention on the image, got none"
        )
    found = np.zeros((len(samples), kept.size))
    for row, sample in zip(found, samples, strict=True):
        entropy = np.where(kept, sample["entropy"].ravel(), np.inf)
        first = np.argsort(entropy, kind="stable")[:LEAST]
        row[first[np.isfinite(entropy[first])]] = 1.0
    return least, found.reshape(mass.shape)


def elbow(values: NDArray) -> float:
    """The value at which sorted values bend most: farthest from the line from first to last.

    Args:
        values: [M].
    """
    rising = np.sort(values)
    line = np.linspace(rising[0], rising[-1], len(rising))
    return float(rising[np.argmax(np.abs(rising - line))])
