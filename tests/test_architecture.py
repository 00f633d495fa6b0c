"""Who may import whom (CONTRIBUTING.md), what `import groundkern` costs, and the size of files.

Imports are read from the sources with `ast`, those inside functions included.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

import groundkern
import groundkern.hf
from tests.sources import (
    PACKAGES,
    ROOT,
    between_children,
    circles,
    files,
    import_graph,
    imported,
    modules,
)

HUGGING_FACE = {"accelerate", "datasets", "huggingface_hub", "peft", "tokenizers", "transformers"}
MAX_LINES = 450
FILES_OF_AN_OP = (
    "api",
    "op",
    "reference",
    "cases",
    "native_kernels",
    "triton_kernels",
    "triton_launch",
)
SKELETON = "skeleton"  # the op in tests/ that a newcomer copies; its files follow the same arrows

# Role of the importer -> roles it may import. A module without a role (torch, the standard library,
# ...) is free. `op` imports the reference because that runs inside the opaque custom op: traced, it
# would need a host sync.
ARROWS = {
    "shared": {"shared"},
    "tiles": {"shared", "tiles", "triton"},
    "native": {"shared", "_C"},
    "taken": {"shared", "taken", "tiles"},
    "contract": {"shared"},  # the op's folder itself: the NamedTuples that its files share
    "native_kernels": {"shared", "contract", "native", "_C"},
    "triton_kernels": {"shared", "contract", "tiles", "triton"},
    "triton_launch": {"shared", "contract", "triton_kernels", "tiles", "triton"},
    "reference": {"shared", "contract"},
    "op": {"shared", "contract", "native_kernels", "triton_launch", "reference"},
    "api": {"shared", "contract", "reference", "op"},
    "cases": {"shared", "api", "cases"},
    "public": {"shared", "api", "public"},
    "parallel": {"shared", "public", "parallel"},
    "hf data": {"shared", "public", "hf data", "hugging face"},
    "hf": {"shared", "taken", "public", "parallel", "hf data", "hf", "hugging face"},
    "trainer": {"public", "hf data", "hf", "trainer", "hugging face"},
    # each imports the trainer that it is for; the program's config and reader of samples are theirs
    "integrations": {
        "shared",
        "public",
        "hf data",
        "hf",
        "trainer",
        "integrations",
        "hugging face",
    },
    "benchmarks": {
        "shared",
        "taken",
        "public",
        "parallel",
        "hf data",
        "hf",
        "cases",
        "benchmarks",
        "hugging face",
    },
    "preparing": {"public", "hf data", "hf", "trainer", "preparing"},
    "ranks": {"public", "hf data", "hf", "trainer", "benchmarks", "ranks", "hugging face"},
    "tests": {
        "shared",
        "taken",
        "public",
        "parallel",
        "hf data",
        "hf",
        "cases",
        "reference",
        "trainer",
        "integrations",
        "benchmarks",
        "preparing",
        "ranks",
        "tests",
        "hugging face",
    },
    "package": set(),
}
AOT_IMPORTS = ("", ".backends.compiler", ".compiler", ".compiler.compiler", ".runtime.jit")
AOT_OPS = ("attention_map", "linear_cross_entropy", "linear_kl", "side_attention")
LAYER_OPS = ("attention_map", "side_attention")
EXCEPTIONS = {
    ("groundkern.backends", "groundkern._C"),  # asks whether it is there, and why not
    ("groundkern.environment", "groundkern._C"),  # reports how it was built
    ("tests.test_bindings", "groundkern._C"),  # tests the binding itself
    ("tests.test_extension", "groundkern._C"),
    ("tests.test_cpu_isa", "groundkern._C"),
    ("tests.test_head_bindings", "groundkern._C"),
    ("tests.test_map_bindings", "groundkern._C"),
    # compiles the launches themselves, on meta tensors
    ("benchmarks.aot.calls", "groundkern.taken_kernels"),
    *(("benchmarks.aot.calls", f"groundkern.ops.{op}.triton_launch") for op in AOT_OPS),
    ("benchmarks.aot.calls", "groundkern.taken_kernels"),
    *(("benchmarks.aot.calls", f"groundkern.ops.{op}") for op in AOT_OPS),
    *(("benchmarks.aot.recorder", f"triton{part}") for part in AOT_IMPORTS),
    # records launches of large devices and of small ones, and the stand-in for a GPU's launcher
    ("benchmarks.aot.recorder", "groundkern.tiles"),
    ("benchmarks.host.stand_in", "groundkern.tiles"),
    ("benchmarks.host.stand_in", "triton.compiler"),
    # times what a launch is made of
    ("benchmarks.host.breakdown", "groundkern.taken_kernels"),
    *(("benchmarks.host.breakdown", f"groundkern.ops.{op}.triton_launch") for op in LAYER_OPS),
    ("benchmarks.host.breakdown", "groundkern.tiles"),
    # counts what is merged as the launchers do
    ("benchmarks.costs.passes", "groundkern.attention_kernels"),
    # notes launches, replaces rows of the tile tables while it times them
    ("benchmarks.launches.noting", "groundkern.tile_kernels"),
    ("benchmarks.launches.noting", "groundkern.tiles"),
    ("benchmarks.launches.noting", "triton.backends.nvidia.driver"),
    ("benchmarks.gpu.devices.dry_runs", "triton.backends.compiler"),
    ("benchmarks.gpu.devices.dry_runs", "triton.runtime.driver"),
    ("benchmarks.gpu.steps.compiling", "groundkern.tiles"),
    ("benchmarks.gpu.steps.sweep", "groundkern.ops.attention_map.triton_launch"),
    ("benchmarks.gpu.steps.sweep", "groundkern.ops.side_attention.triton_launch"),
    ("benchmarks.gpu.steps.sweep", "groundkern.tiles"),
    ("tests.ops.test_tiles", "groundkern.tiles"),
    ("tests.ops.test_linear_kl", "groundkern.ops.linear_kl.op"),
    # calls the op itself, with labels that the public function refuses
    ("tests.ops.test_linear_cross_entropy_triton", "groundkern.ops.linear_cross_entropy"),
    *(("tests.ops.test_calls", f"groundkern.ops.{op}.op") for op in LAYER_OPS),
    ("tests.ops.test_plan", "groundkern.plan_kernels"),
    ("tests.ops.test_plan", "groundkern.tiles"),
    # computes expected times with the launchers' own tiles and splits
    ("benchmarks.costs.passes", "groundkern.ops.attention_map.triton_launch"),
    ("benchmarks.costs.passes", "groundkern.ops.side_attention.triton_launch"),
    ("benchmarks.costs.passes", "groundkern.tiles"),
    # mends Triton's interpreter
    *(("tests.interpreter", f"triton.{part}") for part in ("language", "runtime")),
    ("tests.interleaving", "triton.runtime"),
    ("tests.ops.test_arrivals", "groundkern.tiles"),
    ("tests.ops.test_attention_map_triton", "groundkern.tiles"),
    # compares with one key tile after the other, and with other splits
    ("tests.ops.test_tiles_at_once", "groundkern.tiles"),
    ("tests.ops.test_tiles_at_once", "groundkern.ops.attention_map.triton_launch"),
    # the one tolerance rule
    ("benchmarks.gpu.steps.smoke", "tests.closeness"),
    # draws curves of the study
    ("benchmarks.figures.front", "groundkern.trainer.evidence.curves"),
    ("benchmarks.figures.front", "groundkern.trainer.evidence.figures"),
    # counts what the launchers hand to the C++ kernels
    ("benchmarks.counts.counting", "groundkern.native"),
    ("benchmarks.counts.instructions", "groundkern.native"),
}


def role(module: str) -> str | None:
    """What a module is in the table of arrows; None for a module that is free to import."""
    parts = module.split(".")
    top = parts[0]
    if top == "":
        return "relative"
    if top in HUGGING_FACE:
        return "hugging face"
    if parts[:2] == ["tests", SKELETON] and parts[-1] in FILES_OF_AN_OP:
        return parts[-1]
    if parts == ["tests", SKELETON]:
        return "contract"
    if parts[:2] == ["benchmarks", "preparing"]:
        return "preparing"  # measures what the trainer prepares
    if parts[:2] == ["benchmarks", "ranks"]:
        return "ranks"  # measures runs of the trainer
    if parts[:2] == ["groundkern", "integrations"]:
        return "integrations"
    if parts[:2] in (["groundkern", "trainer"], ["groundkern", "__main__"]):
        return "trainer"
    if top in ("triton", "benchmarks", "tests"):
        return top
    if top != "groundkern":
        return None
    match parts[1:]:
        case ["_C"] | ["native"]:
            return parts[1]
        case ["beside"] | ["taken"]:
            return "taken"
        case ["tiles"]:
            return "tiles"
        case [leaf] if leaf.endswith("_kernels"):
            return "tiles"
        case ["head_kernels"]:
            return "tiles"
        case ["hf", "data", *_]:
            return "hf data"
        case ["hf", *_]:
            return "hf"
        case (
            []
            | ["environment"]
            | [
                "asked"
                | "losses"
                | "maps"
                | "maps_in_time"
                | "metrics"
                | "public"
                | "rasters"
                | "normaliser"
            ]
            | ["compat" | "divergence" | "targets", *_]
        ):
            return "public"
        case ["parallel", *_]:
            return "parallel"
        case ["ops", "cases"]:
            return "cases"
        case ["ops", _, leaf]:
            return leaf
        case ["ops", _]:
            return "contract"
        case ["ops"]:
            return "package"
        case _:
            return "shared"


def violations(sources: dict[str, str]) -> list[str]:
    """Every import against the arrows, as "importer -> imported"; sources by module name."""
    found = []
    for module, source in sources.items():
        importer = role(module)
        for target in imported(source, set(sources)):
            wanted = role(target)
            if wanted is None or (module, target) in EXCEPTIONS:
                continue
            if importer == "tests" and f"{target}.".startswith(f"tests.{SKELETON}."):
                continue
            ops = {m.split(".")[2] for m in (module, target) if m.startswith("groundkern.ops.")}
            if wanted not in ARROWS[importer] or len(ops - {"cases"}) == 2:
                found.append(f"{module} -> {target}")
    return found


def test_imports_follow_the_arrows() -> None:
    sources = modules(*PACKAGES)
    assert {"groundkern", "groundkern.ops.side_attention.native_kernels"} <= set(sources)
    unknown = {m for m in sources if role(m) not in ARROWS}
    assert not unknown, "files that have no place in the layout"
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("groundkern.ops.a.native_kernels", "from groundkern.ops.a import reference"),
        ("groundkern.ops.a.native_kernels", "from . import reference"),
        ("groundkern.ops.a.native_kernels", "from groundkern.ops.a.triton_kernels import forward"),
        ("groundkern.ops.a.op", "from groundkern.ops.a import triton_kernels"),
        ("groundkern.ops.a.triton_kernels", "from groundkern.ops.a.reference import forward"),
        ("groundkern.ops.a.api", "def f():\n    import groundkern.ops.a.native_kernels"),
        ("groundkern.ops.a.triton_kernels", "from groundkern.ops.a.triton_launch import forward"),
        ("groundkern.ops.a.triton_launch", "from groundkern.ops.a.reference import forward"),
        ("groundkern.ops.a.triton_launch", "from groundkern.ops.b.triton_kernels import forward"),
        ("groundkern.ops.a.api", "from groundkern.ops.a.triton_launch import forward"),
        ("groundkern.ops.a.reference", "import triton.language as tl"),
        ("groundkern.ops.a.op", "from groundkern import _C"),
        ("groundkern.ops.a.api", "from groundkern.ops.b import api"),
        ("groundkern.ops.a.api", "from groundkern.ops.a import cases"),
        ("tests.skeleton.api", "from tests.skeleton import native_kernels"),
        ("tests.skeleton.triton_kernels", "import transformers"),
        ("groundkern.losses", "from groundkern.ops.a import op"),
        ("groundkern.maps", "from transformers import AutoConfig"),
        ("groundkern.compat.a", "from groundkern.ops.a.op import forward"),
        ("groundkern.checks", "import groundkern.hf.model.attach"),
        ("groundkern.hf.model.attach", "from groundkern.ops.a.op import forward"),
        (
            "groundkern.hf.model.attach",
            "import importlib\nimportlib.import_module('groundkern.trainer.config')",
        ),
        ("groundkern.hf.data.collator", "from groundkern.hf.model.attach import attach"),
        ("groundkern.hf.data.collator", "def f():\n    from groundkern.hf import attach"),
        ("groundkern.trainer.train", "from groundkern.ops.a import cases"),
        ("groundkern.trainer.train", "from tests.hf import tiny"),
        ("benchmarks.contestants.admission", "from groundkern.ops.a.native_kernels import forward"),
        ("tests.ops.test_a", "from groundkern import _C"),
    ],
)
def test_an_import_against_the_arrows_is_found(module: str, source: str) -> None:
    leaves = ("api", "op", "reference", "triton_kernels")
    others = {f"groundkern.ops.{op}.{leaf}": "" for op in "ab" for leaf in leaves}
    others |= {f"groundkern.ops.a.{leaf}": "" for leaf in ("cases", "native_kernels")}
    others |= {f"tests.{SKELETON}.{leaf}": "" for leaf in FILES_OF_AN_OP}
    others["tests.test_a"] = "from tests.skeleton import op, reference"
    assert violations(others) == []
    found = violations({**others, module: source})
    assert len(found) == 1
    assert found[0].startswith(f"{module} -> ")


def test_exceptions_are_needed() -> None:
    sources = modules(*PACKAGES)
    used = {(m, t) for m, source in sources.items() for t in imported(source, set(sources))}
    assert EXCEPTIONS - used == set()


def test_every_op_has_the_same_files() -> None:
    folders = [path for path in (ROOT / "groundkern" / "ops").iterdir() if path.is_dir()]
    folders = [path for path in folders if path.name != "__pycache__"]
    wanted = {"__init__.py", *(f"{leaf}.py" for leaf in FILES_OF_AN_OP)}
    found = {path.name: {file.name for file in path.glob("*.py")} for path in folders}
    assert len(found) >= 3
    differing = {op: sorted(names ^ wanted) for op, names in found.items() if names != wanted}
    assert differing == {}


LAYERED = ("groundkern", "benchmarks")


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(import_graph(modules(*LAYERED))) == []


def test_no_package_has_children_that_import_one_another() -> None:
    """The modules and sub-packages of every package have an order."""
    graph = import_graph(modules(*LAYERED))
    packages = {module.rpartition(".")[0] for module in graph} - {""}
    assert {"groundkern.hf", "groundkern.trainer.prepare", "benchmarks"} <= packages
    found = {package: circles(between_children(graph, package)) for package in sorted(packages)}
    assert {package: paths for package, paths in found.items() if paths} == {}


def test_a_circle_is_found() -> None:
    sources = {
        "a": "",
        "a.one": "from a import two",
        "a.two": "def f():\n    from a.three import g",
        "a.three": "import a.one",
        "a.four": "import a.one",
    }
    graph = import_graph(sources)
    assert circles(graph) == ["a.one -> a.two -> a.three -> a.one"]
    assert circles({**graph, "a.three": set()}) == []


def test_a_circle_of_packages_is_found() -> None:
    there, back = "from a.right.two import f", "import a.left.four"
    sources = {"a.left.one": there, "a.right.two": "", "a.right.three": back, "a.left.four": ""}
    graph = import_graph(sources)
    assert circles(graph) == []
    assert circles(between_children(graph, "a")) == ["a.left -> a.right -> a.left"]
    assert circles(between_children(graph, "a.right")) == []


@pytest.mark.parametrize("package", [groundkern, groundkern.hf])
def test_what_a_package_offers_is_what_its_public_module_has(package: ModuleType) -> None:
    submodules = getattr(package, "SUBMODULES", ())
    public = import_module(f"{package.__name__}.public")
    names = [name for name in vars(public) if not name.startswith("_")]
    assert sorted([*names, *submodules]) == package.__all__
    assert all(getattr(package, name) is getattr(public, name) for name in names)
    assert [getattr(package, name).__name__ for name in submodules] == [
        f"{package.__name__}.{name}" for name in submodules
    ]
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = package.nothing_such


def test_import_groundkern_is_light() -> None:
    """Neither the import nor a reference call loads transformers, a kernel or the extension.

    The call may load triton: torch itself does, where it is installed, to run a custom op.
    """
    program = """
import sys
import groundkern, groundkern.hf
early = {"torch", "transformers"} & set(sys.modules)
import torch
before = set(sys.modules)
groundkern.side_attention
imported = set(sys.modules) - before
zero = torch.zeros(1, dtype=torch.int32)
rows = groundkern.QueryRows.causal(zero, zero)
q, k = torch.ones(1, 2, 4), torch.ones(1, 2, 3, 4)
groundkern.side_attention(q, k, k, rows, backend="reference")
called = set(sys.modules) - before
heavy = {"transformers", "groundkern._C", "PIL", "groundkern.trainer"}
ours = {m for m in called if m.startswith("groundkern.")}
kernels = {m for m in ours if m.endswith(("_kernels", "_launch"))}
print(sorted(early | heavy & called | kernels | {"triton"} & imported))
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
