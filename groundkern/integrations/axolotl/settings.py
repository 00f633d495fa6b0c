"""The section `groundkern:` of an axolotl YAML: the same fields as `groundkern train`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_serializer, model_validator

from groundkern.integrations.axolotl.conflicts import conflicts
from groundkern.trainer.config import Objectives, Positive, Section, Supervision, setting

MAX_PIXELS = 100_000_000


class GroundkernSection(Section):
    """What the plugin is told; an unknown field is refused."""

    objectives: Objectives = setting(Objectives(), "trained beside the text loss, as docs/methods")
    supervision: Supervision = setting(Supervision(), "how rows and targets are made")
    root: Path | None = setting(
        None, "folder that image paths start from and stay in (null: that of the first data set)"
    )
    max_length: Positive | None = setting(
        None, "tokens a sample may have; text is cut, never images (null: nothing is cut)"
    )
    max_pixels: Positive = setting(MAX_PIXELS, "pixels an image may have")
    examine: bool = setting(True, "check the model's wiring on the first batch that has rows")

    @model_validator(mode="after")
    def _served_here(self) -> GroundkernSection:
        if self.objectives.distill is not None:
            raise ValueError("`objectives.distill`: expected null, since axolotl loads no teacher")
        for name in ("smam", "klal"):
            how = getattr(self.objectives, name)
            if how is not None and how.control == "shuffled":
                wanted = "random or complement, since regions of other samples are not at hand"
                raise ValueError(f"`objectives.{name}.control`: expected {wanted}, got shuffled")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The objectives that are on, by name."""
        return {name: how for name, how in self.objectives if how is not None}


class GroundkernArgs(BaseModel):
    """What axolotl's own config inherits, so that it validates the section."""

    groundkern: GroundkernSection | None = None

    @model_validator(mode="after")
    def _goes_with_the_rest(self) -> GroundkernArgs:
        if self.groundkern is not None and self.groundkern.given:
            for sentence in conflicts(self):
                raise ValueError(sentence)
        return self

    @field_serializer("groundkern")
    def _whole(self, section: GroundkernSection | None) -> dict[str, Any] | None:
        """Every field, those that are null too: axolotl dumps its config without these."""
        return None if section is None else section.model_dump(mode="json")


def section_of(cfg: Any) -> GroundkernSection | None:
    """The section of a config, if it switches an objective on.

    Args:
        cfg: axolotl's validated config.

    Returns:
        The section; None: there is nothing to do.
    """
    given = cfg.get("groundkern")
    if given is None:
        return None
    section = GroundkernSection.model_validate(dict(given))
    return section if section.given else None
