"""The settings of groundkern in a run of another program: objectives, supervision, boxes.

Their fields are those of `groundkern train` (`groundkern.trainer.config`); what the program has
settings of its own for (model, data files, steps) is not here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from groundkern.hf.objectives import Objectives as Attached
from groundkern.trainer.config import Objectives, Section, Supervision, setting
from groundkern.trainer.wording import short

NEEDS = {
    "smam": ("aligned", "regions"),
    "klal": ("map", "regions"),
    "margins": ("map", "regions"),
    "logit_lens": ("raise", "regions"),
    "patch_text": ("contrast", "regions"),
    "dv_sft": ("word", "words"),
    "hist": ("phrase", "phrases"),
}
"""By objective: its kind of row in `groundkern.hf.data.batch.COUNTS`, and what samples need."""


class Settings(Section):
    """What a run of another program says of groundkern."""

    objectives: Objectives = setting(Objectives(), "what is trained beside the text loss")
    supervision: Supervision = setting(Supervision(), "how rows are made of regions and words")
    boxes: str = setting("auto", "boxes in answers: auto, none, or a style (docs/data/boxes.md)")
    coord: Literal["pixel", "resized", "unit", "per_mille", "percent", "square"] | None = setting(
        None, "what numbers of these boxes count that do not say so"
    )
    examine: bool = setting(True, "run doctor on the first batch that has rows")

    @property
    def on(self) -> list[str]:
        """The names of the objectives that are on."""
        return [name for name, value in self.objectives if value is not None]

    @property
    def attached(self) -> dict[str, Any]:
        """Keyword arguments of `groundkern.hf.attach`."""
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


def read_settings(given: Mapping[str, Any] | str | Path | None, where: str) -> Settings:
    """The settings of plain values, or of a YAML or JSON file.

    Args:
        given: sections by name, a path, or None: all defaults, with which no objective is on.
        where: what starts an error message.

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
        settings = Settings.model_validate(dict(given))
    except ValidationError as error:
        raise ValueError(f"{where}: {_sentence(error)}") from None
    if settings.objectives.distill is not None:
        raise ValueError(
            f"{where}: `objectives.distill`: expected null here (no teacher is loaded)"
        )
    klal = settings.objectives.klal
    for name, objective in (("smam", settings.objectives.smam), ("klal", klal)):
        if objective is not None and objective.control == "shuffled":
            wanted = "a control that needs no other sample's regions"
            raise ValueError(
                f"{where}: `objectives.{name}.control`: expected {wanted}, got shuffled"
            )
    if klal is not None and klal.control and settings.objectives.margins is not None:
        wanted = "no objectives.margins beside it, which read the same targets"
        raise ValueError(f"{where}: `objectives.klal.control`: expected {wanted}")
    Attached(**settings.attached)
    return settings


def _sentence(error: ValidationError) -> str:
    """The first problem: the field, what was wanted, what came."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(first["loc"][-1]), _names(), n=1)
        return f"`{name}`: no such field" + (f"; did you mean `{close[0]}`?" if close else "")
    if first["type"] == "value_error":
        return f"`{name}`: {first['ctx']['error']}"
    wanted = first["msg"].removeprefix("Input should be ")
    return f"`{name}`: expected {wanted}, got {short(first['input'])}"


def _names() -> list[str]:
    kinds = [Settings, Objectives, Supervision]
    names = [name for kind in kinds for name in kind.model_fields]
    for field in Objectives.model_fields.values():
        inner = next(iter(getattr(field.annotation, "__args__", ())), None)
        names += getattr(inner, "__pydantic_fields__", {})
    return names
