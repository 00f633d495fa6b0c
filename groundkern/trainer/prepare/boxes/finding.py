"""The boxes and points of a text about images, as places in fractions of one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from groundkern.trainer.data.images import SampleError
from groundkern.trainer.places.kinds import Kinds
from groundkern.trainer.places.layouts import Place
from groundkern.trainer.places.notations import Mark, marks_in, sound
from groundkern.trainer.places.patterns import Numbers
from groundkern.trainer.places.styles import STYLES
from groundkern.trainer.places.units import Extent, Resized, Size, extent
from groundkern.trainer.prepare.placing import Frame

TITLES = {
    "boxes_read": "boxes and points in answers, tied to their images",
    "boxes_inverted": "boxes in messages with swapped corners or no area, left out",
    "boxes_outside": "boxes and points in messages outside their image, left out",
    "boxes_unknown": "boxes and points in messages whose numbers may count anything (say --coord)",
    "boxes_of_which": "boxes and points in messages that do not say which image, left out",
    "boxes_without": "boxes and points in messages without an image, left out",
}


@dataclass(frozen=True)
class Found:
    """A mark and its place.

    Args:
        mark: in the text.
        numbers: in fractions of the image, inside it; None: it has no place that could be used.
        image: its index.
    """

    mark: Mark
    numbers: Numbers | None = None
    image: int = 0

    @property
    def place(self) -> Place:
        label = self.mark.label
        return Place(self.numbers, None if label is None else label.text)


@dataclass(frozen=True)
class Reading:
    """How the marks of texts are read.

    Args:
        notation: "auto" for what is unmistakable, or the name of a style.
        coord: what numbers count that do not say so; of a named style all of its numbers.
        resized: of the model, for pixels of its processor.
        overhang: share of a side by which a box may stick out, to be cut.
    """

    notation: str = "auto"
    coord: str | None = None
    resized: Resized | None = None
    overhang: float = 0.01

    @property
    def unit(self) -> str | None:
        """What numbers count that do not say so."""
        return self.coord or (None if self.notation == "auto" else STYLES[self.notation].unit)

    def find(self, text: str, sizes: Sequence[Size], where: str, counts: Counter) -> list[Found]:
        """The marks of a text in their order; those without a usable place are counted.

        Args:
            text: of a message.
            sizes: (width, height) of the record's images.
            where: the record, for messages.
            counts: gets what `TITLES` names.
        """
        only = () if self.notation == "auto" else STYLES[self.notation].notations
        found = []
        for mark in marks_in(text, only=only):
            image, problem = self._image(mark, sizes)
            numbers = None
            if problem is None:
                numbers, problem = self._inside(mark, sizes[image], where)
            if problem is not None:
                counts[problem] += 1
            found.append(Found(mark, numbers, image))
        return found

    def look(
        self, text: str, sizes: Sequence[Size], where: str, kinds: Kinds, thousandths: Kinds
    ) -> None:
        """Shows the numbers of a text to `kinds`, those of notations in thousandths to another."""
        only = () if self.notation == "auto" else STYLES[self.notation].notations
        for mark in marks_in(text, only=only):
            image, problem = self._image(mark, sizes)
            if problem is not None or not sound(mark):
                continue
            if not self._spoken(mark):
                kinds.add(mark.numbers, sizes[image], where)
            elif mark.whole == (1000.0, 1000.0):
                thousandths.add(mark.numbers, sizes[image], where)

    def _spoken(self, mark: Mark) -> bool:
        """Whether the notation says what a mark's numbers count, and nobody says otherwise."""
        return mark.whole is not None and (self.coord is None or self.notation == "auto")

    def _image(self, mark: Mark, sizes: Sequence[Size]) -> tuple[int, str | None]:
        """(the image of a mark, or what keeps it from being known)."""
        if not sizes:
            return 0, "boxes_without"
        if mark.image is not None and 0 <= mark.image < len(sizes):
            return mark.image, None
        return 0, None if len(sizes) == 1 and mark.image is None else "boxes_of_which"

    def _inside(self, mark: Mark, size: Size, where: str) -> tuple[Numbers | None, str | None]:
        """(the numbers in fractions of the image, or what is wrong with them)."""
        if not sound(mark):
            return None, "boxes_inverted"
        spoken = self._spoken(mark)
        if not spoken and self.unit is None:
            return None, "boxes_unknown"
        try:
            if spoken:
                whole = Extent((0.0, 0.0), mark.whole)
            else:
                whole = extent(self.unit, size, self.resized)
            frame, given = Frame(1, 1, self.overhang, where), list(whole.fractions(mark.numbers))
            inside = frame.box(given, "box")[0] if mark.is_box else frame.point(given, "point")[0]
        except (SampleError, ValueError):  # outside, or no image for the processor
            return None, "boxes_outside"
        return tuple(inside), None
