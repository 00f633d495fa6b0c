"""Fine-tune a vision-language model with grounding supervision: `groundkern`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundkern.trainer.samples import load_samples

__all__ = ["load_samples"]


if not TYPE_CHECKING:  # to a checker every name would be one of the package's

    def __getattr__(name: str) -> Any:
        """Imports what is named when it is first used: most commands need little of the package."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from groundkern.trainer.samples import load_samples

        globals()[name] = load_samples
        return load_samples


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
