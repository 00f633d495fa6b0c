"""The style that a model's family writes boxes in, from the `model_type` of its config.json."""

from __future__ import annotations

from pathlib import Path

from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError
from groundkern.trainer.places.styles import STYLES, Style

_OF_FAMILY = {family: style for style in STYLES.values() for family in style.families}


def style_of(model: str | Path) -> Style:
    """The style of a model folder.

    Raises:
        ConfigError: no config.json is there, or its family is of no known style.
    """
    path = Path(model) / "config.json"
    try:
        config = durable.read_json(path)
        kind = config.get("model_type") if isinstance(config, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`--model`: expected a model folder, got {model} ({error})") from None
    if not isinstance(kind, str) or kind not in _OF_FAMILY:
        raise ConfigError(
            f"`--box-style`: expected one of {', '.join(STYLES)}, since it is not known how "
            f"{kind!r:.80} of {model} writes boxes"
        )
    return _OF_FAMILY[kind]


def style_named(name: str, model: str | Path | None) -> Style:
    """The style of a name; "auto": the model's.

    Raises:
        ConfigError: an unknown name, or "auto" without a model or with an unknown one.
    """
    if name == "auto":
        if model is None:
            raise ConfigError("`--box-style auto`: expected --model, the folder of a model")
        return style_of(model)
    if name not in STYLES:
        raise ConfigError(f"`--box-style`: expected one of {', '.join(STYLES)}, got {name!r:.80}")
    return STYLES[name]
