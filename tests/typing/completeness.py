"""How much of the public API has a type that pyright knows: `make types-complete`.

It asks basedpyright for every symbol of the package and looks at those of public functions and
classes. It exits with 1 and names them if any is unknown, or says nothing of its type.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from types import ModuleType

PACKAGES = ("groundkern", "groundkern.hf", "groundkern.parallel", "groundkern.trainer.demo")
MODULES = (
    "groundkern.compat.cut_cross_entropy",
    "groundkern.compat.liger",
    "groundkern.compat.torch",
    "groundkern.hf.blip",
    "groundkern.losses",
    "groundkern.lse",
    "groundkern.maps",
    "groundkern.metrics",
    "groundkern.parallel.heads",
)


def public_names() -> set[str]:
    """Full names of what is public, where it is defined."""
    found = set()
    for package in map(import_module, PACKAGES):
        for name in package.__all__:
            x = getattr(package, name)
            if not isinstance(x, ModuleType):
                found.add(f"{x.__module__}.{x.__qualname__}")
    for module in map(import_module, MODULES):
        for name, x in vars(module).items():
            if not name.startswith("_") and getattr(x, "__module__", None) == module.__name__:
                found.add(f"{module.__name__}.{name}")
    return found


def main() -> int:
    command = (sys.executable, "-m", "basedpyright", "--verifytypes", "groundkern")
    options = ("--ignoreexternal", "--outputjson")
    # it looks for packages where the first `python` on PATH has them
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path}
    said = subprocess.run(
        (*command, *options), stdout=subprocess.PIPE, env=environment, check=False
    )
    symbols = json.loads(said.stdout)["typeCompleteness"]["symbols"]
    public = public_names()
    seen = [x for x in symbols if _is_of(x["name"], public)]
    bad = [x for x in seen if not x["isTypeKnown"] or x["isTypeAmbiguous"]]
    for x in bad:
        for said_of in x["diagnostics"] or [{"message": "unknown"}]:
            print(f"{x['name']}: {said_of['message']}")
    known = len(seen) - len(bad)
    print(f"{len(public)} public functions and classes, {len(seen)} symbols, {known} known types")
    return 1 if bad or len(seen) < len(public) else 0


def _is_of(name: str, public: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in public for end in range(2, len(parts) + 1))


if __name__ == "__main__":
    sys.exit(main())
