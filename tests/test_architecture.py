"""Who may import whom (CONTRIBUTING.md), what `import groundkern` costs, and the size of files.

The arrows are read from the sources with `ast`, lazy imports inside functions included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("groundkern", "trainer", "benchmarks", "tests")
HUGGING_FACE = {"accelerate", "datasets", "huggingface_hub", "peft", "tokenizers", "transformers"}
MAX_LINES = 450

# Role of the importer -> roles it may import. What has no role (torch, the standard library, ...)
# is free. op imports the reference, which runs inside the opaque custom op: traced, it would need
# a sync.
ARROWS = {
    "shared": {"shared"},
    "tiles": {"triton"},
    "native": {"_C"},
    "kernels": {"shared", "kernels", "tiles", "native", "triton", "_C"},
    "reference": {"shared"},
    "op": {"shared", "kernels", "reference"},
    "api": {"shared", "reference", "op"},
    "cases": {"shared", "api", "cases"},
    "public": {"shared", "api", "public"},
    "hf": {"shared", "public", "hf", "hugging face"},
    "trainer": {"public", "hf", "trainer", "hugging face"},
    "benchmarks": {"shared", "public", "hf", "cases", "benchmarks", "hugging face"},
    "preparing": {"public", "hf", "trainer", "preparing"},
    "tests": {
        "shared",
        "public",
        "hf",
        "cases",
        "reference",
        "trainer",
        "benchmarks",
        "preparing",
        "tests",
        "hugging face",
    },
    "package": set(),
}
AOT_IMPORTS = ("", ".backends.compiler", ".compiler", ".compiler.compiler", ".runtime.jit")
AOT_OPS = ("attention_map", "linear_cross_entropy", "side_attention")
EXCEPTIONS = {
    ("groundkern.backends", "groundkern._C"),  # asks whether it is there, and why not
    ("tests.test_bindings", "groundkern._C"),  # tests the binding itself
    ("tests.test_head_bindings", "groundkern._C"),
    ("tests.test_map_bindings", "groundkern._C"),
    # compiles the launches themselves, on meta tensors
    *(("benchmarks.aot.calls", f"groundkern.ops.{op}.triton_kernels") for op in AOT_OPS),
    *(("benchmarks.aot.recorder", f"triton{part}") for part in AOT_IMPORTS),
    # notes launches, replaces rows of the tile tables while it times them
    ("benchmarks.noting", "groundkern.tiles"),
    ("benchmarks.noting", "triton.backends.nvidia.driver"),
    ("benchmarks.gpu.launches", "triton.backends.compiler"),
    ("benchmarks.gpu.launches", "triton.runtime.driver"),
    ("benchmarks.gpu.compiling", "groundkern.tiles"),
    ("benchmarks.gpu.sweep", "groundkern.ops.attention_map.triton_kernels"),
    ("benchmarks.gpu.sweep", "groundkern.ops.side_attention.triton_kernels"),
    ("benchmarks.gpu.sweep", "groundkern.tiles"),
    ("tests.ops.test_tiles", "groundkern.tiles"),
    # the one tolerance rule
    ("benchmarks.gpu.smoke", "tests.closeness"),
    # counts what the launchers hand to the C++ kernels
    ("benchmarks.counts", "groundkern.native"),
    ("benchmarks.instructions", "groundkern.native"),
}


def role(module: str) -> str | None:
    """What a module is in the table of arrows; None for a module that is free to import."""
    parts = module.split(".")
    top = parts[0]
    if top == "":
        return "relative"
    if top in HUGGING_FACE:
        return "hugging face"
    if parts[:2] == ["benchmarks", "preparing"]:
        return "preparing"  # measures what the trainer prepares
    if top in ("triton", "trainer", "benchmarks", "tests"):
        return top
    if top != "groundkern":
        return None
    match parts[1:]:
        case ["_C"] | ["tiles"] | ["native"]:
            return parts[1]
        case ["hf", *_]:
            return "hf"
        case [] | ["losses" | "maps" | "metrics"]:
            return "public"
        case ["ops", "cases"]:
            return "cases"
        case ["ops", _, leaf]:
            return "kernels" if leaf.endswith("_kernels") else leaf
        case ["ops", *_]:
            return "package"
        case _:
            return "shared"


def imported(source: str, modules: set[str]) -> Iterator[str]:
    """The modules a source imports, anywhere in it, by statement or by `import_module("name")`.

    A relative import comes as it is written: absolute ones are the rule.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in modules or full == "groundkern._C" else base
        elif isinstance(node, ast.Call) and node.args:
            function = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.args[0]
            if function == "import_module" and isinstance(name, ast.Constant):
                yield name.value


def violations(sources: dict[str, str]) -> list[str]:
    """Every import against the arrows, as "importer -> imported"; sources by module name."""
    found = []
    for module, source in sources.items():
        importer = role(module)
        for target in imported(source, set(sources)):
            wanted = role(target)
            if wanted is None or (module, target) in EXCEPTIONS:
                continue
            ops = {m.split(".")[2] for m in (module, target) if m.startswith("groundkern.ops.")}
            if wanted not in ARROWS[importer] or len(ops - {"cases"}) == 2:
                found.append(f"{module} -> {target}")
    return found


def files(*suffixes: str) -> list[Path]:
    """The repository's own files: its folders and the top level, without what is built."""
    folders = [ROOT / name for name in (*PACKAGES, "csrc", "docs", ".ci")]
    paths = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    generated = {ROOT / "groundkern" / "_C.py"}
    return [
        path
        for path in sorted(paths)
        if path.is_file()
        and path.suffix in suffixes
        and "__pycache__" not in path.parts
        and path not in generated
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_follow_the_arrows() -> None:
    paths = [p for p in files(".py") if p.relative_to(ROOT).parts[0] in PACKAGES]
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in paths}
    assert {"groundkern", "groundkern.ops.side_attention.native_kernels"} <= set(sources)
    unknown = {m for m in sources if role(m) not in ARROWS}
    assert not unknown, "files that have no place in the layout"
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("groundkern.ops.a.native_kernels", "from groundkern.ops.a import reference"),
        ("groundkern.ops.a.native_kernels", "from . import reference"),
        ("groundkern.ops.a.triton_kernels", "from groundkern.ops.a.reference import forward"),
        ("groundkern.ops.a.api", "def f():\n    import groundkern.ops.a.native_kernels"),
        ("groundkern.ops.a.reference", "import triton.language as tl"),
        ("groundkern.ops.a.op", "from groundkern import _C"),
        ("groundkern.ops.a.api", "from groundkern.ops.b import api"),
        ("groundkern.ops.a.api", "from groundkern.ops.a import cases"),
        ("groundkern.losses", "from groundkern.ops.a import op"),
        ("groundkern.maps", "from transformers import AutoConfig"),
        ("groundkern.checks", "import groundkern.hf.attach"),
        ("groundkern.hf.attach", "from groundkern.ops.a.op import forward"),
        ("groundkern.hf.attach", "import importlib\nimportlib.import_module('trainer.config')"),
        ("trainer.train", "from groundkern.ops.a import cases"),
        ("trainer.train", "from tests.hf import tiny"),
        ("benchmarks.harness", "from groundkern.ops.a.native_kernels import forward"),
        ("tests.ops.test_a", "from groundkern import _C"),
    ],
)
def test_an_import_against_the_arrows_is_found(module: str, source: str) -> None:
    others = {
        f"groundkern.ops.{op}.{leaf}": "" for op in "ab" for leaf in ("api", "op", "reference")
    }
    others |= {f"groundkern.ops.a.{leaf}": "" for leaf in ("cases", "native_kernels")}
    assert violations(others) == []
    found = violations({**others, module: source})
    assert len(found) == 1
    assert found[0].startswith(f"{module} -> ")


def test_import_groundkern_is_light() -> None:
    """Neither the import nor a reference call loads transformers, a kernel or the extension.

    The call may load triton: torch itself does, where it is installed, to run a custom op.
    """
    program = """
import sys
import torch
before = set(sys.modules)
import groundkern
imported = set(sys.modules) - before
zero = torch.zeros(1, dtype=torch.int32)
rows = groundkern.QueryRows.causal(zero, zero)
q, k = torch.ones(1, 2, 4), torch.ones(1, 2, 3, 4)
groundkern.side_attention(q, k, k, rows, backend="reference")
called = set(sys.modules) - before
heavy = {"transformers", "groundkern._C", "PIL", "trainer"}
kernels = {m for m in called if m.startswith("groundkern.") and m.endswith("_kernels")}
print(sorted(heavy & called | kernels | {"triton"} & imported))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files(".py", ".cpp", ".h", ".cu")
    }
    assert lengths
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}


MACHINE_PATH = re.compile(r"(?<![\w.{}~*-])/(?:root|home|Users|work|mnt|opt)/\w")


def test_no_machine_paths() -> None:
    """Nothing in the repository names a place on the machine it was written on."""
    example = "/".join(["", "home", "me", "groundkern"])
    assert MACHINE_PATH.search(f'ROOT = "{example}"')
    suffixes = (".py", ".cpp", ".h", ".cu", ".md", ".toml", ".txt", ".yaml", ".yml", ".html", "")
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in files(*suffixes)
        if (match := MACHINE_PATH.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}
