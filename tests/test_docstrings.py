"""Docstrings of the public functions and classes: every parameter, what comes back, what is raised,
and where a method comes from."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

import pytest

import groundkern
from groundkern import checks, hf, parallel

PUBLIC_MODULES = (
    *("losses", "lse", "maps", "maps_in_time", "metrics", "parallel.heads", "rasters"),
)
ADAPTERS = ("torch", "liger", "cut_cross_entropy")  # of groundkern.compat
# What serves no method of a paper.
NO_SOURCE = {
    "groundkern.losses.mean_rows",
    "groundkern.metrics.label_hits",
    "groundkern.hf.objectives.Objectives",
}
SOURCED_FUNCTIONS = ("groundkern.losses", "groundkern.metrics", "groundkern.ops")
SOURCED_CLASSES = ("groundkern.hf.objectives",)
CHECKS = {"fail", "require", "tensor", "finite_positive"}  # of groundkern.checks

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source):", re.MULTILINE)
ENTRY = re.compile(r"^    (\w+(?:, \w+)*):", re.MULTILINE)


def members(module: str, names: Iterator[str] | list[str]) -> dict[str, Callable]:
    """Functions and classes of a module, and the public methods of its classes, by full name."""
    found = {}
    for name in names:
        value = getattr(importlib.import_module(module), name)
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        home = f"{value.__module__}.{value.__name__}"
        found[home] = value
        if inspect.isclass(value):
            found |= {f"{home}.{n}": method for n, method in _methods(value)}
    return found


def _methods(cls: type) -> Iterator[tuple[str, Callable]]:
    """Public methods that a class defines itself and that override none of another library's, be
    it in the class or, of a mixin, in a subclass."""
    related = {*cls.__mro__, *(base for sub in cls.__subclasses__() for base in sub.__mro__)}
    foreign = [base for base in related if not base.__module__.startswith("groundkern")]
    for name, value in vars(cls).items():
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        theirs = any(name in vars(base) for base in foreign)
        if inspect.isfunction(value) and not name.startswith("_") and not theirs:
            yield name, value


def defined_in(module: str) -> dict[str, Callable]:
    """The public functions and classes that a module defines."""
    named = vars(importlib.import_module(module)).items()
    own = [n for n, x in named if getattr(x, "__module__", None) == module and n[0] != "_"]
    return members(module, own)


def sections(doc: str) -> dict[str, str]:
    """A docstring's sections by name; "" is what comes before the first."""
    doc = inspect.cleandoc(doc)
    marks = [*SECTION.finditer(doc)]
    ends = [match.start() for match in marks] + [len(doc)]
    found = {m[1]: doc[m.end() : end] for m, end in zip(marks, ends[1:])}
    return {"": doc[: ends[0]], **found}


def parameters(value: Callable) -> list[str]:
    """What a docstring has to explain: a function's parameters, a data class's fields."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if field.name[0] != "_"]
    if inspect.isclass(value) and "__init__" not in vars(value):
        return []
    found = inspect.signature(value).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in found if p.kind not in variadic and p.name not in ("self", "cls")]


def silent_fields(value: type) -> list[str]:
    """Fields of a NamedTuple that neither its docstring names nor a comment beside them tells."""
    source, doc = inspect.getsource(value), value.__doc__
    return [
        name
        for name in (value._fields if issubclass(value, tuple) else ())
        if not re.search(rf"\b{name}\b", doc) and not re.search(rf"^ +{name}: .*# ", source, re.M)
    ]


def raises(value: Callable) -> bool:
    """Whether a function checks or raises: itself, or in a function of its module that it calls."""
    module = inspect.getmodule(value)
    pending, seen = [value], set()
    while pending:
        function = pending.pop()
        seen.add(function)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Raise):
                return True
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.removeprefix("checks.") in CHECKS:
                return True
            other = getattr(module, called, None)
            local = inspect.isfunction(other) and other.__module__ == module.__name__
            if local and other not in seen:
                pending.append(other)
    return False


def returns(value: Callable) -> bool:
    annotation = inspect.signature(value).return_annotation
    return annotation not in (None, "None", inspect.Signature.empty)


def missing(name: str, value: Callable) -> list[str]:
    """What a docstring lacks, one phrase each."""
    if not value.__doc__:
        return ["a docstring"]
    found = sections(value.__doc__)
    lacking = [] if found[""].strip() else ["a first sentence"]
    entries = ENTRY.findall(found.get("Args", "") + found.get("Attributes", ""))
    explained = {one for entry in entries for one in entry.split(", ")}
    lacking += [f"`{p}`" for p in parameters(value) if p not in explained]
    if inspect.isclass(value):
        lacking += [f"`{field}`" for field in silent_fields(value)]
        wanted = {"Source": name.startswith(SOURCED_CLASSES) and name.count(".") == 3}
    else:
        wanted = {
            "Returns": returns(value),
            "Raises": raises(value),
            "Source": name.startswith(SOURCED_FUNCTIONS),
        }
    wanted["Source"] &= name not in NO_SOURCE
    return lacking + [f"{title}:" for title, due in wanted.items() if due and title not in found]


PUBLIC = members("groundkern", groundkern.__all__) | members("groundkern.hf", hf.__all__)
PUBLIC |= members("groundkern.parallel", parallel.__all__)
for _module in PUBLIC_MODULES:
    PUBLIC |= defined_in(f"groundkern.{_module}")
for _module in ADAPTERS:
    PUBLIC |= defined_in(f"groundkern.compat.{_module}")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_docstring_says_everything(name: str) -> None:
    assert missing(name, PUBLIC[name]) == []


def _documented(x: int, *, name: str = "") -> int:
    """The sum.

    Args:
        x: a number.
        name, other: texts.

    Returns:
        A number.

    Raises:
        ValueError: always.
    """
    return _helper(x, name)


def _helper(x: int, name: str) -> int:
    checks.fail(name, "nothing", x)


def test_a_whole_docstring_lacks_nothing() -> None:
    assert missing("some.function", _documented) == []
    assert missing("groundkern.losses.some", _documented) == ["Source:"]


@pytest.mark.parametrize(
    ("part", "lacking"),
    [
        ("The sum.", ["a first sentence"]),
        ("x: ", ["`x`"]),
        ("name, other: ", ["`name`"]),
        ("Returns:", ["Returns:"]),
        ("Raises:", ["Raises:"]),
    ],
)
def test_what_is_missing_is_found(monkeypatch, part: str, lacking: list[str]) -> None:
    monkeypatch.setattr(_documented, "__doc__", _documented.__doc__.replace(part, ""))
    assert missing("some.function", _documented) == lacking
