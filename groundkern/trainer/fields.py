"""The names of the fields of settings, and the sentence about one that does not fit."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel

from groundkern.trainer.train_files import TrainFile
from groundkern.trainer.wording import VALUE, cut, short

HELP = "--help lists all fields"


def unknown_field(name: str, kind: type[BaseModel], otherwise: str = HELP) -> str:
    """The sentence about a name that is no field, with the closest one that is.

    Args:
        name: dotted, from the root on.
        kind: what the root is.
        otherwise: what is said where no field is close.
    """
    name = name[:1000]  # comparing takes time that grows with its square
    of_file = re.match(r"data\.train\.\d+\.", name)
    start = of_file[0] if of_file else ""
    known = list(TrainFile.model_fields) if of_file else field_names(kind)
    rest = name.removeprefix(start)
    same_end = [other for other in known if other.endswith("." + rest.rpartition(".")[2])]
    cutoff = 0.0 if same_end else 0.5
    close = difflib.get_close_matches(rest, same_end or known, n=1, cutoff=cutoff)
    hint = f"did you mean `{start}{close[0]}`?" if close else otherwise
    return f"`{cut(name, VALUE)}`: no such field; {hint}"


def field_names(kind: type[BaseModel]) -> list[str]:
    """The dotted name of every field and section.

    Args:
        kind: what they are counted from.
    """
    names = []
    pending = [(name, field.annotation) for name, field in kind.model_fields.items()]
    while pending:
        name, annotation = pending.pop(0)
        names.append(name)
        for kind in (annotation, *get_args(annotation)):
            inner = getattr(kind, "__pydantic_fields__", {})
            pending += [(f"{name}.{key}", field.annotation) for key, field in inner.items()]
    return names


def sentence(problems: list[Any], kind: type[BaseModel], otherwise: str = HELP) -> str:
    """What is wrong, in one sentence, of which `where` is the start.

    Args:
        problems: pydantic's errors, one or more.
        kind: what was validated.
        otherwise: as in `unknown_field`.
    """
    first = told(problems)
    name = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "missing":
            missing = (".".join(map(str, problem["loc"])) for problem in problems)
            return f"{', '.join(f'`{each}`' for each in missing)}: required, but not given"
        case "extra_forbidden" | "unexpected_keyword_argument" | "invalid_key":
            text = unknown_field(name, kind, otherwise)
        case "value_error":  # of a validator of ours: it may name the field within its section
            said = str(first["ctx"]["error"])
            inner = re.fullmatch(r"`(\w+)`: (.*)", said)
            text = f"`{name}.{inner[1]}`: {inner[2]}" if inner else f"`{name}`: {said}"
        case "path_type":
            text = f"`{name}`: expected a path, got {short(first['input'])}"
        case "too_short":
            text = f"`{name}`: expected at least one, got none"
        case _:
            wanted = first["msg"].removeprefix("Input should be ").split(", unable")[0]
            text = f"`{name}`: expected {wanted}, got {short(first['input'])}"
    return text if len(problems) == 1 else f"{text} (and {len(problems) - 1} more)"


def told(problems: list[Any]) -> Any:
    """The problem that `sentence` tells: another than a missing field, if there is one.

    Args:
        problems: pydantic's errors, one or more.
    """
    return min(problems, key=lambda problem: problem["type"] == "missing")
