"""Lets the torchvision of PyPI be imported beside a torch for CPUs.

Some families have an image processor on torchvision only, and what they use of it (resizing) is
Python over torch. But PyPI has torchvision built for CUDA alone, whose library of C++ operators
cannot be loaded beside a torch for CPUs, as `make` and CI install it; and then `import torchvision`
fails where Python kernels are given to operators that do not exist. So these are declared first.
Whoever calls one (no image processor does) is told by torchvision that it could not load them.

`benchmarks.families` does this on import, `make families-test` as a plugin of pytest. Without
torchvision, or with one that fits, nothing is done.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


@cache
def declare_operators() -> tuple[torch.library.Library, ...]:
    """Declare what an installed torchvision expects of a library that it cannot load.

    Returns:
        The library of declarations, if any were needed: they last as long as it does.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return ()
    folder = Path(spec.origin).parent
    for_cuda = re.search(r"\+cu\d+", (folder / "version.py").read_text(encoding="utf-8"))
    if torch.version.cuda is not None or for_cuda is None:
        return ()
    library = torch.library.Library("torchvision", "DEF")
    source = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', source):
        library.define(f"{name}(Tensor boxes) -> Tensor")
    return (library,)


declare_operators()
