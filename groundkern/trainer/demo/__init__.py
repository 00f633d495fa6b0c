"""The demo's data and model: word pages, charts and a pointing task, in the format users bring.

`small_model()` and `examples(64)` are what the examples train where no model is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundkern.trainer.demo.small import examples, small_model

__all__ = ["examples", "small_model"]


if not TYPE_CHECKING:  # to a checker every name would be one of the package's

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from groundkern.trainer.demo import small  # on first use: transformers takes seconds

        return getattr(small, name)
