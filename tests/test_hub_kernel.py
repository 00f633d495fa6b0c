"""tools/hub_kernel.py: the ops as a kernel of the Hub, loaded beside the installed package."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import groundkern

ROOT = Path(__file__).resolve().parents[1]


def loaded(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


hub_kernel = loaded(ROOT / "tools" / "hub_kernel.py", "hub_kernel")

# What `kernels` does with a variant, without it: a package under a name of its own.
CALL = """
import importlib.util, json, pathlib, sys
import torch
folder = pathlib.Path(sys.argv[1])
sys.modules["groundkern"] = None  # it may not need an installed one
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
for public in kernel.__all__:
    getattr(kernel, public)
print(kernel.available_backends()["native"])
logits = kernel.linear_log_prob(torch.eye(3), torch.eye(3), torch.arange(3))
assert hasattr(torch.ops, name) and list(getattr(torch.ops, name)), "its ops have its namespace"
assert not list(torch.ops.groundkern), "and none has the package's"
"""


def side_attention(module: ModuleType, backend: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8).requires_grad_() for _ in range(3))
    rows = module.QueryRows.causal(torch.tensor([0, 0]), torch.tensor([5, 11]))
    out, lse = module.side_attention(rows.take(q), k, v, rows, backend=backend)
    (out.square().sum() + lse.sum()).backward()
    return [out, lse, q.grad, k.grad, v.grad]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    assert hub_kernel.main([str(out), "--variant", "cpu", "--repo-id", "me/groundkern"]) == 0
    return out


def test_a_variant_needs_no_installed_groundkern(project: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", CALL, str(project / "build" / "torch-cpu")]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels of the Hub have none of our C++" in done.stdout


def test_the_project_has_every_module_but_those_left_out(project: Path) -> None:
    made = {str(p.relative_to(project / "torch-ext")) for p in project.glob("torch-ext/**/*.py")}
    assert "groundkern/ops/side_attention/triton_kernels.py" in made
    left_out = {name for name in made if name.split("/")[1] in hub_kernel.LEFT_OUT}
    assert left_out == {"groundkern/_C.py"}  # which says why
    assert json.loads((project / "build/torch-cpu/metadata.json").read_text())["version"] == 0
    card = (project / "CARD.md").read_text()
    assert all(f"- `{name}`" in card for name in groundkern.__all__)


def test_nothing_in_the_project_imports_what_was_left_out(project: Path) -> None:
    code = project / "build" / "torch-cpu"
    missing = []
    for path in code.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                of = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                if not (of.is_dir() or of.with_suffix(".py").is_file()):
                    missing.append((str(path.relative_to(code)), node.module))
    assert missing == []


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("from groundkern import _C\n", "from ... import _C\n"),
        ("def f():\n    from groundkern.a.b import c\n", "def f():\n    from ...a.b import c\n"),
        ("from groundkern.a import (\n    b,\n)\n", "from ...a import (\n    b,\n)\n"),
        ('"""Of groundkern."""\nimport os\n', '"""Of groundkern."""\nimport os\n'),
        (
            'from __future__ import annotations\nimport os\nx = "groundkern::y"\n',
            "from __future__ import annotations\nfrom ..._ops import add_op_namespace_prefix\n"
            'import os\nx = add_op_namespace_prefix("y")\n',
        ),
    ],
)
def test_a_module_becomes_portable(source: str, wanted: str) -> None:
    assert hub_kernel.portable(source, Path("ops/a/op.py")) == wanted


@pytest.mark.parametrize("source", ["import groundkern.a\n", 'find("groundkern.a")\n'])
def test_what_cannot_be_made_portable_is_told(source: str) -> None:
    with pytest.raises(ValueError, match=r"op\.py:1: "):
        hub_kernel.portable(source, Path("ops/a/op.py"))


def test_kernels_loads_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the package itself: build.toml, the metadata and its digest, the loader; and an op agrees
    with the installed package's, in one process."""
    why = "the package kernels is not installed (docs/releasing.md)"
    kernels = pytest.importorskip("kernels", reason=why)
    from kernels._rust import Build, Digest, Metadata

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backends = {str(backend) for backend in Build.open(project).general.backends}
    assert backends == set(hub_kernel.BACKENDS)
    variant = project / "build" / "torch-cpu"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))

    kernel = kernels.get_local_kernel(project, backend="cpu")
    assert kernel.__name__ == metadata.id
    for wanted, got in zip(*(side_attention(x, "reference") for x in (groundkern, kernel))):
        assert torch.equal(wanted, got)
