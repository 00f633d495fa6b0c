"""The repository's own files, and who imports whom, read from the sources with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("groundkern", "benchmarks", "tests")


def files(*suffixes: str) -> list[Path]:
    """Files of the top level and of the repository's folders, without what is built."""
    folders = [ROOT / name for name in (*PACKAGES, "csrc", "docs", "examples", "tools", ".ci")]
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
    """The name under which a file of the repository is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(*packages: str) -> dict[str, str]:
    """Sources of the packages' modules, by module name."""
    paths = [p for p in files(".py") if p.relative_to(ROOT).parts[0] in packages]
    return {module_name(path): path.read_text(encoding="utf-8") for path in paths}


def imported(source: str, known: set[str]) -> Iterator[str]:
    """The modules that a source imports, anywhere in it: by statement, inside functions and under
    TYPE_CHECKING too, by `import_module("name")`, or by `x = importorskip("name")`,
    which as a statement of its own only skips.

    `from a import b` is an import of `a.b` if that is one of the known modules, else of `a`. A
    relative import comes as it is written: absolute ones are the rule.
    """
    for base, name in _import_statements(source):
        full = f"{base}.{name}"
        yield full if name and (full in known or full == "groundkern._C") else base


@cache
def _import_statements(source: str) -> tuple[tuple[str, str], ...]:
    """(module, name imported from it or "") of a source, in its order."""
    nodes = list(ast.walk(ast.parse(source)))
    statements = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [(base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function == "import_module" or (
                function == "importorskip" and id(node) not in statements
            ):
                found.append((node.args[0].value, ""))
    return tuple(found)


Graph = Mapping[str, set[str]]


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which of the modules each one imports."""
    known = set(sources)
    return {
        module: {target for target in imported(source, known) if target in known} - {module}
        for module, source in sources.items()
    }


def between_children(graph: Graph, package: str) -> dict[str, set[str]]:
    """Which of a package's children import one another; a child stands for all that is in it."""
    depth = package.count(".") + 2

    def child(module: str) -> str | None:
        inside = module.startswith(package + ".")
        return ".".join(module.split(".")[:depth]) if inside else None

    edges: dict[str, set[str]] = {}
    for module, targets in graph.items():
        if (importer := child(module)) is not None:
            found = {child(target) for target in targets} - {None, importer}
            edges.setdefault(importer, set()).update(found)
    return edges


def circles(graph: Graph) -> list[str]:
    """The shortest circle through each node that lies on one, as "a -> b -> a", each once."""
    found: dict[frozenset[str], str] = {}
    for start in sorted(graph):
        path = _shortest_circle(graph, start)
        if path:
            found.setdefault(frozenset(path), " -> ".join([*path, start]))
    return list(found.values())


def _shortest_circle(graph: Graph, start: str) -> list[str]:
    paths, reached = [[start]], {start}
    while paths:
        longer = []
        for path in paths:
            for target in sorted(graph.get(path[-1], ())):
                if target == start:
                    return path
                if target not in reached:
                    reached.add(target)
                    longer.append([*path, target])
        paths = longer
    return []
