"""One input of any data set to samples, by the data set's adapter.

An adapter is a module `groundkern.trainer.prepare.adapt.<data set>` with `PHRASING` (values its
question and answer may use, and their defaults; None if the data set has questions and answers),
`inputs(options) -> (source, root)` and `convert(item, options) -> Made`. `root` is the folder image
paths start from, None if images are written beside the output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.sources import Item, Source


@dataclass(frozen=True)
class Adapt:
    """The work on one input of a data set, for `groundkern.trainer.prepare.pipeline`."""

    dataset: str
    options: Options

    def inputs(self) -> tuple[Source, Path | None]:
        """The inputs, and the root of their images.

        Raises:
            ConfigError: what is there is not the data set, or an option does not fit it.
        """
        adapter = self._adapter()
        if adapter.PHRASING is None:
            if self.options.question is not None or self.options.answer is not None:
                raise ConfigError(f"adapt: {self.dataset} has questions and answers of its own")
        else:
            default, known = adapter.PHRASING
            self.options.phrasing(default).check(known, self.options.writer)
        return adapter.inputs(self.options)

    def warnings(self, source: Source) -> list[str]:
        """What the first inputs say against the options, one sentence each.

        Args:
            source: of `inputs`; this has been `rooted` since.
        """
        adapter = self._adapter()
        return adapter.warnings(source, self.options) if hasattr(adapter, "warnings") else []

    def rooted(self, root: Path | None) -> Adapt:
        return replace(self, options=replace(self.options, root=root))

    def __call__(self, item: Item) -> Made:
        return self._adapter().convert(item, self.options)

    def _adapter(self) -> Any:
        elsewhere = {"infographicvqa": "docvqa", "chat": "chat.adapter"}
        module = elsewhere.get(self.dataset, self.dataset)
        return import_module(f"groundkern.trainer.prepare.adapt.{module}")
