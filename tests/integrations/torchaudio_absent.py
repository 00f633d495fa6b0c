"""A pytest plugin: stands for torchaudio, of which PyPI has no build for this torch.

LLaMA-Factory imports it and calls it for samples with sound alone.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

if find_spec("torchaudio") is None:
    module = ModuleType("torchaudio")
    module.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = module
