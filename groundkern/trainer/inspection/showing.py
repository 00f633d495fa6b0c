"""Samples to pieces of the page, in their order; by several processes where there are many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.inspection.cards import card
from groundkern.trainer.inspection.recent import Recent
from groundkern.trainer.inspection.views import edges
from groundkern.trainer.templating import environment
from groundkern.trainer.workers import cores, forked, forks

if TYPE_CHECKING:
    from groundkern.trainer.inspection.seen import SeenByModel

CHUNK = 4  # samples that a process takes at a time
AHEAD = 3  # chunks waiting for each process
EACH = 24  # samples that pay for another process


@dataclass(frozen=True)
class Shown:
    """A sample as a piece of the page.

    Args:
        where: the sample's name.
        html: its card, which names its pictures.
        pictures: by their names, as they stand in the page before the first card that has them.
        warned: something about it looks wrong.
        failed: it cannot be shown, and the card says why.
        counts: supervision found and lost in it.
        labels: how many of its visual tokens have each label, or set of labels.
    """

    where: str
    html: str
    pictures: dict[str, str]
    warned: bool
    failed: bool
    counts: Counter
    labels: Counter[tuple[int, ...]]


class Show:
    """Makes the pieces.

    Args:
        dataset: the samples.
        oddities: by name, which samples have them, of `groundkern.trainer.inspection.summary`.
        model: whose view is shown, if any.
        only_warned: make no card of a sample without a warning.
    """

    def __init__(
        self,
        dataset: JsonLinesDataset,
        oddities: dict[str, np.ndarray],
        model: SeenByModel | None = None,
        *,
        only_warned: bool = False,
    ) -> None:
        self.dataset, self.oddities, self.model = dataset, oddities, model
        self.only_warned = only_warned
        self._recent = Recent()

    def __call__(self, index: int) -> Shown:
        """The piece of one sample; its html is empty if it is not wanted."""
        before = self._found()
        made = card(self.dataset.sample(index), self.model, self._recent)
        counts, labels = (after - then for after, then in zip(self._found(), before))
        odd = [f"a sample {why}" for why, which in self.oddities.items() if which[index]]
        made.warnings = odd + made.warnings
        warned = bool(made.warnings)
        if self.only_warned and not warned:
            return Shown(made.where, "", {}, warned, made.failed, counts, labels)
        card_of, picture_of = self._macros
        pictures = {view.key: str(picture_of(view)) for view in made.views}
        return Shown(made.where, str(card_of(made)), pictures, warned, made.failed, counts, labels)

    def _found(self) -> tuple[Counter, Counter]:
        """What the model has seen so far: counts, and labels."""
        if self.model is None:
            return Counter(), Counter()
        return Counter(self.model.counts), Counter(self.model.labels)

    @cached_property
    def _macros(self) -> tuple[Callable, Callable]:
        module = environment().get_template("inspect_card.html", globals={"edges": edges}).module
        return module.card, module.picture


def shown(
    show: Show, indices: Sequence[int], count: int, processes: int | None = None
) -> Iterator[Shown]:
    """The first `count` samples that are wanted, each as a piece of the page.

    Args:
        show: makes the pieces.
        indices: of the samples to choose from, in their order.
        count: how many to show at most.
        processes: to use; None: by the number of samples and the cores of this machine.

    Raises:
        SampleError: the data file is not what it was, or a process was killed.
    """
    if processes is None:
        most = len(indices) if show.only_warned else min(count, len(indices))
        processes = min(cores(), most // EACH + 1) if forks() else 1
    found = map(show, indices) if processes <= 1 else _by_processes(show, indices, processes)
    left = count
    for piece in found if left else ():
        if piece.html:
            yield piece
            left -= 1
        if not left:
            break


def _by_processes(show: Show, indices: Sequence[int], processes: int) -> Iterator[Shown]:
    def chunk(start: int) -> list[Shown]:
        return [show(index) for index in indices[start : start + CHUNK]]

    try:
        for pieces in forked(chunk, range(0, len(indices), CHUNK), processes, ahead=AHEAD):
            yield from pieces
    except BrokenProcessPool:
        raise SampleError(
            f"{show.dataset.path.name}: a process that draws it was killed (out of memory?)"
        ) from None
