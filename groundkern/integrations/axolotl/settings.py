"""The section `groundkern:` of an axolotl YAML: the same fields as `groundkern train`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_serializer, field_validator, model_validator

from groundkern.integrations.axolotl.conflicts import conflicts
from groundkern.integrations.shared.settings import RunSettings, read_settings
from groundkern.trainer.config import Positive, setting
from groundkern.trainer.data.images import MAX_PIXELS

SECTION = "groundkern"


class GroundkernSection(RunSettings):
    """What the plugin is told; an unknown field is refused."""

    root: Path | None = setting(
        None, "folder that image paths start from and stay in (null: that of the first data set)"
    )
    max_length: Positive | None = setting(
        None, "tokens a sample may have; text is cut, never images (null: nothing is cut)"
    )
    max_pixels: Positive = setting(MAX_PIXELS, "pixels an image may have")


class GroundkernArgs(BaseModel):
    """What axolotl's own config inherits, so that it validates the section."""

    groundkern: GroundkernSection | None = None

    @field_validator("groundkern", mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Says what is wrong as every program's run is told."""
        return None if given is None else read_settings(given, SECTION, GroundkernSection)

    @model_validator(mode="after")
    def _goes_with_the_rest(self) -> GroundkernArgs:
        if self.groundkern is not None and self.groundkern.attached:
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
    given = cfg.get(SECTION)
    if given is None:
        return None
    section = GroundkernSection.model_validate(dict(given))
    return section if section.attached else None
