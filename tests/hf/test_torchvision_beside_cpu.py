"""A torchvision that was built for another torch: what it expects of its library is declared."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families import torchvision_beside_cpu
from benchmarks.families.torchvision_beside_cpu import declare_operators

PYTHON = '@torch.library.register_fake("torchvision::of_a_test")\ndef fake(boxes): ...\n'


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Writes a torchvision of a version into a folder of its own, the only one that is found."""

    def write(version: str) -> None:
        (tmp_path / "version.py").write_text(f"__version__ = {version!r}\n")
        (tmp_path / "_meta_registrations.py").write_text(PYTHON)
        found = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
        monkeypatch.setattr(torchvision_beside_cpu, "find_spec", lambda _: found)

    declare_operators.cache_clear()
    yield write
    declare_operators.cache_clear()


def test_operators_of_a_build_for_cuda_are_declared(installed, monkeypatch):
    installed("0.28.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", None)
    (library,) = declare_operators()
    assert hasattr(torch.ops.torchvision, "of_a_test")
    library._destroy()


@pytest.mark.parametrize(("version", "cuda"), [("0.28.0+cpu", None), ("0.28.0+cu130", "13.0")])
def test_nothing_is_declared_where_torchvision_fits(installed, monkeypatch, version, cuda):
    installed(version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert declare_operators() == ()
