"""The settings of groundkern in a run of another program: objectives and supervision.

Their fields are those of `groundkern train` (`groundkern.trainer.config`); what the program has
settings of its own for (model, data files, steps) is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from groundkern.hf.objectives import Objectives as Attached
from groundkern.trainer.config import Objectives, Section, Supervision, setting
from groundkern.trainer.conflicts import objective_conflicts
from groundkern.trainer.fields import sentence
from groundkern.trainer.wording import short


class RunSettings(Section):
    """What every program's run says of groundkern."""

    objectives: Objectives = setting(Objectives(), "what is trained beside the text loss")
    supervision: Supervision = setting(Supervision(), "how rows are made of regions and words")
    examine: bool = setting(True, "run doctor on the first batch that has rows")

    @property
    def attached(self) -> dict[str, Any]:
        """Keyword arguments of `groundkern.hf.attach`: the objectives that are on."""
        return {name: value for name, value in self.objectives if value is not None}

    @property
    def collating(self) -> dict[str, Any]:
        """Keyword arguments of `GroundingCollator`."""
        smam, klal = self.objectives.smam, self.objectives.klal
        return self.supervision.model_dump() | {
            "keep_registers": smam is not None and smam.keep == "registers",
            "side_control": None if smam is None else smam.control,
            "map_control": None if klal is None else klal.control,
            "lens": self.objectives.logit_lens is not None,
            "contrast": self.objectives.patch_text is not None,
            "query_tokens": klal is not None and klal.by_queries,
        }


class Settings(RunSettings):
    """The same where data files are the program's own, whose answers may have boxes in them."""

    boxes: str = setting("auto", "boxes in answers: auto, none, or a style (docs/data/boxes.md)")
    coord: Literal["pixel", "resized", "unit", "per_mille", "percent", "square"] | None = setting(
        None, "what numbers of these boxes count that do not say so"
    )


Kind = TypeVar("Kind", bound=RunSettings)


def read_settings(
    given: Mapping[str, Any] | str | Path | None, where: str, kind: type[Kind] = Settings
) -> Kind:
    """The settings of plain values, or of a YAML or JSON file.

    Args:
        given: sections by name, a path, or None: all defaults, with which no objective is on.
        where: what starts an error message.
        kind: of settings.

    Returns:
        The settings.

    Raises:
        ValueError: an unknown field, a value that does not fit, a file that is not there, or an
            objective that needs more than another program's run has.
    """
    if isinstance(given, str | Path):
        where = str(given)
        if not Path(given).is_file():
            raise ValueError(f"{where}: expected a YAML or JSON file, got none there")
        given = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected sections by name, got {short(given)}")
    try:
        settings = kind.model_validate(dict(given))
    except ValidationError as error:
        sections = f"the fields are {', '.join(kind.model_fields)}"
        problem = sentence(error.errors(include_url=False), kind, sections)
        raise ValueError(f"{where}: {problem}") from None
    for name, problem in _conflicts(settings.objectives):
        raise ValueError(f"{where}: `{name}`: {problem}")
    Attached(**settings.attached)
    return settings


def _conflicts(objectives: Objectives) -> Iterator[tuple[str, str]]:
    """(field, sentence) of what needs more than a run of another program has."""
    if objectives.distill is not None:
        yield "objectives.distill", "expected null, since no teacher is loaded here, got settings"
    for name in ("smam", "klal"):
        objective = getattr(objectives, name)
        if objective is not None and objective.control == "shuffled":
            wanted = "random or complement, since regions of other samples are not at hand"
            yield f"objectives.{name}.control", f"expected {wanted}, got shuffled"
    yield from objective_conflicts(objectives)
