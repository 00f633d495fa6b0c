"""The ops as a kernel of the Hugging Face Hub: `python tools/hub_kernel.py OUT [--variant cpu]`.

OUT becomes a kernel-builder project of Python and Triton alone ("torch-noarch"): build.toml,
flake.nix, CARD.md and torch-ext/groundkern, which is this tree's groundkern without what needs
transformers or a C++ build. A hub kernel is loaded under a name of its own, beside other versions
of itself, so imports become relative and the ops are registered in the namespace that
kernel-builder chooses.

--variant also writes OUT/build/torch-BACKEND, as kernel-builder would, for
`kernels.get_local_kernel` to load: kernel-builder itself needs Nix.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

NAME = "groundkern"
PACKAGE = Path(__file__).resolve().parents[1] / NAME
BACKENDS = ("cpu", "cuda", "rocm")
# hf, trainer and integrations need transformers; cases are for tests; the rest is about an
# installed package.
LEFT_OUT = (
    "hf", "trainer", "integrations", "__main__.py", "environment.py", "cases.py", "_C.py",
    "__pycache__",
)  # fmt: skip
NO_NATIVE = '''\
"""Stands where the C++ extension would be."""

raise ImportError("kernels of the Hub have none of our C++; `pip install groundkern` does")
'''
BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "apache-2.0"
backends = [{backends}]
{hub}
[torch-noarch]
"""
FLAKE = """\
{
  description = "groundkern's ops";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
CARD = """\
---
library_name: kernels
license: apache-2.0
---

# groundkern

Attention of a few query rows, attention maps and their divergences, and linear cross entropy with
its log probabilities and distillation: the ops of groundkern, without a tensor of scores or logits.

{functions}

The Triton kernels serve CUDA and ROCm; on CPU this kernel runs the PyTorch reference, which is
slow. `pip install groundkern` has C++ kernels for CPU, and losses for transformers.
"""
OPS = '''\
"""The namespace of this build's ops."""

import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(name: str) -> str:
    return f"{id}::{{name}}"
'''


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--variant", choices=BACKENDS, action="append", default=[])
    parser.add_argument("--version", type=int, default=0, help="of the kernel; 0 is for alphas")
    parser.add_argument("--repo-id", help="where kernel-builder uploads to, as OWNER/NAME")
    arguments = parser.parse_args(words)
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    write_project(arguments.out, arguments.version, arguments.repo_id)
    for backend in arguments.variant:
        write_variant(arguments.out, backend, arguments.version)
    return 0


def write_project(out: Path, version: int, repo_id: str | None = None) -> None:
    """The project that kernel-builder builds."""
    code = out / "torch-ext" / NAME
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if set(inside.parts) & set(LEFT_OUT):
            continue
        target = code / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(portable(path.read_text(encoding="utf-8"), inside), encoding="utf-8")
    (code / "_C.py").write_text(NO_NATIVE, encoding="utf-8")
    hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else ""
    names = ", ".join(f'"{backend}"' for backend in BACKENDS)
    settings = BUILD.format(name=NAME, version=version, backends=names, hub=hub)
    (out / "build.toml").write_text(settings, encoding="utf-8")
    (out / "flake.nix").write_text(FLAKE, encoding="utf-8")
    functions = "\n".join(f"- `{name}`" for name in public_names())
    (out / "CARD.md").write_text(CARD.format(functions=functions), encoding="utf-8")


def write_variant(out: Path, backend: str, version: int) -> Path:
    """One build of the project, with the metadata that `kernels` reads; returns its folder."""
    variant = out / "build" / f"torch-{backend}"
    shutil.copytree(out / "torch-ext" / NAME, variant)
    content = hashlib.sha256(json.dumps(digests(variant)).encode()).hexdigest()
    identity = f"_{NAME}_{backend}_{content[:7]}"
    (variant / "_ops.py").write_text(OPS.format(id=identity), encoding="utf-8")
    metadata = {
        "id": identity,
        "name": NAME,
        "version": version,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests(variant)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    return variant


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in files
    }


def public_names() -> list[str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError("groundkern/__init__.py: no __all__")


def portable(source: str, path: Path) -> str:
    """A module's text with relative imports, and with its ops in the build's namespace.

    Args:
        source: the text.
        path: of the module inside the package.

    Raises:
        ValueError: it names the package in a way that is not known here.
    """
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    dots = "." * len(path.parts)
    registers = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute = [name.name for name in node.names if name.name.split(".")[0] == NAME]
            if absolute:
                raise ValueError(f"{path}:{node.lineno}: import {absolute[0]}; write it as from")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            rest = node.module.removeprefix(NAME).removeprefix(".")
            row = node.lineno - 1
            before, after = f"from {node.module} import", f"from {dots}{rest} import"
            lines[row] = lines[row].replace(before, after, 1)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(f"{NAME}::"):
            row, op = node.lineno - 1, str(node.value).partition("::")[2]
            prefixed = f'add_op_namespace_prefix("{op}")'
            lines[row] = lines[row].replace(f'"{node.value}"', prefixed, 1)
            registers = True
        elif isinstance(node, ast.Constant) and str(node.value).startswith(f"{NAME}."):
            raise ValueError(f"{path}:{node.lineno}: names the module {node.value!r} in a string")
    if registers:
        lines.insert(first_import(tree), f"from {dots}_ops import add_op_namespace_prefix\n")
    return "".join(lines)


def first_import(tree: ast.Module) -> int:
    """The line before which an import may be written, counted from 0."""
    for node in tree.body:
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if isinstance(node, ast.Import | ast.ImportFrom) and not future:
            return node.lineno - 1
    raise ValueError("a module without imports")


if __name__ == "__main__":
    sys.exit(main())
