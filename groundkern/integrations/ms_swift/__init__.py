"""groundkern in ms-swift: a plugin that `swift sft --external_plugins FILE` imports.

`FILE` is one of yours with two lines,

    from groundkern.integrations.ms_swift import register
    register(objectives={"klal": {}, "smam": {}})

or the one whose path `python -m groundkern.integrations.ms_swift` prints, which reads the YAML or
JSON file that the environment's GROUNDKERN_SETTINGS names.

Source: ms-swift 4.6.0 (docs/trainers/ms-swift.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VARIABLE = "GROUNDKERN_SETTINGS"
"""The environment's name of the settings file that `PLUGIN` reads."""
PLUGIN = Path(__file__).with_name("swift_plugin.py")
"""A file for `--external_plugins`."""

__all__ = ["PLUGIN", "VARIABLE", "register"]


def register(settings: str | Path | None = None, **sections: Any) -> None:
    """Train with grounding losses in the run that is being set up; again: with these instead.

    Args:
        settings: a YAML or JSON file; None: the sections are given by name.
        sections: of `groundkern.integrations.shared.settings.Settings`, such as `objectives`.

    Raises:
        ValueError: settings that do not fit; both a file and sections; Megatron, whose trainer is
            another one.
        ImportError: ms-swift is not installed, or has another shape than 4.6.0.
    """
    if settings is not None and sections:
        raise ValueError("register: expected a file or sections, got both")
    from groundkern.integrations.ms_swift import swift_registry
    from groundkern.integrations.shared.settings import read_settings

    given = sections if settings is None else settings
    swift_registry.register(read_settings(given, "register"))
