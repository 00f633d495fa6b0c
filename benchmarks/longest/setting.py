"""What is trained, and how: everything that decides how many bytes a step holds."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.training_step.kept import PRECISIONS, Precision
from benchmarks.training_step.model import Rows, Shape

OURS, MAPS, EAGER, SDPA = "groundkern", "eager + output_attentions", "eager", "sdpa"
METHODS = (OURS, SDPA, EAGER, MAPS)
ROWS = Rows()
SMALL = Shape(128, 4, 2, 1, 352, 4096, 2, 32)  # what is measured: 32,768 tokens fit 4 GB
PATCHES = 4  # of a visual token
PATCH = 1176  # numbers of a patch: 3 colours, 2 frames, 14 x 14 pixels


@dataclass(frozen=True)
class Setting:
    """One training step.

    Args:
        shape: of the model.
        method: of METHODS. The first trains with SMAM, DV-SFT and KLAL; the last with KLAL, from
            the probabilities that eager attention returns; the others without grounding.
        tokens: of the sample, three quarters of them visual.
        precision: of `PRECISIONS`.
        checkpointed: every layer keeps its input only.
        offload: and that in the host's memory.
        tiled: the feed-forward part runs on tiles of the sequence, and again in the backward pass.
        lora: the rank of adapters beside which nothing trains; None: all of the decoder trains.
        vision: whether the vision tower trains.
        rows: how much of the sample is supervised.
        triton: the output head is served by our Triton kernels, else by those in C++.
    """

    shape: Shape
    method: str
    tokens: int
    precision: str = "float32"
    checkpointed: bool = False
    offload: bool = False
    tiled: bool = False
    lora: int | None = None
    vision: bool = False
    rows: Rows = ROWS
    triton: bool = False

    @property
    def numbers(self) -> Precision:
        """Bytes of a number."""
        return PRECISIONS[self.precision]

    @property
    def side(self) -> int:
        """Side tokens of SMAM, which go through every layer too."""
        return self.rows.side if self.method == OURS else 0

    @property
    def length(self) -> int:
        """Tokens that go through the layers."""
        return self.tokens + self.side

    @property
    def visual(self) -> int:
        """Visual tokens, as `training_step.model.sample` draws them."""
        return self.rows.visual(self.tokens)

    @property
    def head_dim(self) -> int:
        return self.shape.hidden // self.shape.heads

    @property
    def keeps_maps(self) -> bool:
        """Whether attention stores its probabilities."""
        return self.method in (EAGER, MAPS)
