"""One form for bad input: the argument's name, what was wanted, what came."""

from typing import NoReturn


def fail(name: str, wanted: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise `kind` in the one message form of the library."""
    raise kind(f"`{name}`: expected {wanted}, got {got}")


def require(condition: bool, name: str, wanted: str, got: object) -> None:
    """Raise `ValueError` in the one message form unless `condition` holds."""
    if not condition:
        fail(name, wanted, got)
