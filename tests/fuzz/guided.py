"""The same targets driven by coverage: needs the package atheris, which nothing else does."""

from __future__ import annotations

import random
import sys
from importlib import import_module
from pathlib import Path

from tests.fuzz.mutating import LARGEST, mutate_from
from tests.fuzz.running import Failure, attempt
from tests.fuzz.scratch import folder as scratch
from tests.fuzz.scratch import written
from tests.fuzz.target import Target

INSTRUMENTED = ("groundkern.trainer", "groundkern.hf.data", "json", "yaml")


def run_guided(target: Target, inputs: int, seed: int, folder: Path) -> int:
    """Runs libFuzzer over a target with our mutations; 1 if an input failed, 2 without atheris.

    Ends at the first failure, as libFuzzer does; its input is written to `folder`.
    """
    try:
        import atheris
    except ImportError:
        print("--guided: needs the package atheris (pip install atheris)", file=sys.stderr)
        return 2
    for name in sorted(sys.modules):
        module = sys.modules[name]
        if name.startswith(INSTRUMENTED) and getattr(module, "__file__", None):
            _instrument(atheris, module)
    import_module("tests.fuzz.targets")
    found = folder / target.name
    found.mkdir(parents=True, exist_ok=True)
    for name, data in target.seeds.items():
        written(f"seeds/{name}", data)

    def once(data: bytes) -> None:
        result = attempt(target, data)
        if isinstance(result, Failure):
            raise RuntimeError(result.what)

    def changed(data: bytes, size: int, number: int) -> bytes:
        return mutate_from(random.Random(number), target, data)[: min(size, LARGEST)]

    options = [f"-runs={inputs}", f"-seed={seed + 1}", f"-max_len={LARGEST}"]
    options += [f"-artifact_prefix={found}/new-", "-timeout=60", str(scratch() / "seeds")]
    atheris.Setup([sys.argv[0], *options], once, custom_mutator=changed)
    atheris.Fuzz()
    return 0


def _instrument(atheris, module) -> None:
    """Counts the branches of a module's functions, in place."""
    import types

    for value in list(vars(module).values()):
        holders = [value] if isinstance(value, types.FunctionType) else []
        if isinstance(value, type) and value.__module__ == module.__name__:
            holders = [v for v in vars(value).values() if isinstance(v, types.FunctionType)]
        for function in holders:
            if function.__module__ == module.__name__:
                atheris.instrument_func(function)
