"""groundkern in LLaMA-Factory: `python -m groundkern.integrations.llama_factory train my.yaml`.

`my.yaml` is LLaMA-Factory's own file with a section `groundkern`
(`groundkern.integrations.shared.settings.Settings`). Nothing of LLaMA-Factory is edited on disk:
`install` puts subclasses in the place of its converters, its supervised preprocessing, its collator
and its trainer, for this process.

Source: LLaMA-Factory 0.9.5 (docs/trainers/llama-factory.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["install", "main", "run"]


def install() -> None:
    """Put groundkern into LLaMA-Factory, once; its settings come with the arguments of a run.

    Raises:
        ImportError: LLaMA-Factory is not installed, or has another shape than 0.9.5.
    """
    from groundkern.integrations.llama_factory import patch

    patch.install()


def run(args: Mapping[str, Any], callbacks: list[Any] | None = None) -> None:
    """Train as `llamafactory.train.tuner.run_exp` does.

    Args:
        args: of `run_exp`, with a section `groundkern`.
        callbacks: of `run_exp`.

    Raises:
        ValueError: settings that do not fit, or do not go together with the run's.
    """
    install()
    from llamafactory.train import tuner

    tuner.run_exp(dict(args), callbacks)


def main() -> None:
    """`llamafactory-cli` with groundkern in it; only `train` differs.

    Raises:
        ValueError: as `run`.
    """
    install()
    from llamafactory import launcher

    if len(sys.argv) > 1 and sys.argv[1].endswith((".yaml", ".yml", ".json")):
        from llamafactory.train.tuner import run_exp  # a process that torchrun has started

        run_exp()
        return
    launcher.__file__ = __file__.replace("__init__.py", "__main__.py")  # what torchrun is given
    launcher.launch()
