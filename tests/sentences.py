"""The sentences with which the sources refuse or warn, read with `ast`, values written as `…`.

A small interpreter follows assignments through each function, so that `wanted = "..."` a few lines
before `fail(name, wanted, got)` is found. What it cannot follow is a value: `…`.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.sources import ROOT, files

VALUE = "…"
MOST = 16  # alternatives of one text; beyond them it is a value
# name(field, wanted, got), of which only the last two are always there
FORM = {"fail", "require", "wrong", "_wrong"}
ENDS = {"fail", "_refuse", "error"}  # calls that do not come back
SAYS = {
    *("warn", "warning", "_warn_once", "_say", "error", "_left", "_of_other", "ArgumentTypeError"),
    *("ValueError", "TypeError", "RuntimeError", "OSError", "AttributeError", "IndexError"),
    *("ImportError", "CannotRun", "ConfigError", "SampleError", "DataChanged", "LeftOut"),
    *("RankError", "StorageError", "DivergedError", "Stopped", "BadMarks", "BadPhrases"),
    *("RefusedRequest", "EndpointError"),
}
# Functions whose result is a sentence, and tables of them.
ANSWERS = re.compile(
    r"_?unsupported\w*|_missing_\w+|_of_checkpointing|_nothing_left|sentence|_sentence|unknown_field"
)
TABLES = ("NO_PLACE", "REFUSED")

Env = dict[str, list[str]]


class Sentence(NamedTuple):
    """A sentence as it is printed, and where it is made."""

    path: str
    line: int
    text: str


def sentences(*folders: str) -> list[Sentence]:
    """Every refusal and warning of the sources under these folders, each once a line.

    Args:
        folders: from the root of the repository, such as "groundkern".
    """
    found: dict[Sentence, None] = {}
    for path in files(".py"):
        name = str(path.relative_to(ROOT))
        if name.startswith(tuple(f"{folder}/" for folder in folders)):
            found |= dict.fromkeys(of_source(path.read_text(encoding="utf-8"), name))
    return list(found)


def of_source(source: str, path: str) -> Iterator[Sentence]:
    """The sentences of one source.

    Args:
        source: Python.
        path: by which the sentences are told apart.
    """
    reader = _Reader(path)
    reader.block(ast.parse(source).body, {}, "")
    for sentence in reader.found:
        text = re.sub(f"{VALUE}(?:\\s*{VALUE})*", VALUE, " ".join(sentence.text.split()))
        if re.search(r"[a-z]\w", re.sub("expected|got|None", "", text)):
            yield sentence._replace(text=text)


class _Reader:
    """Walks statements in order, with what each name may be."""

    def __init__(self, path: str) -> None:
        self.path, self.found = path, []

    def block(self, statements: list[ast.stmt], env: Env, function: str) -> Env | None:
        """What names are behind the statements; None: they never end there."""
        for statement in statements:
            if env is None:
                return None
            env = self._statement(statement, env, function)
        return env

    def _statement(self, node: ast.stmt, env: Env, function: str) -> Env | None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self._definition(node, env)
            return env
        for part in _own_expressions(node):
            self._expression(part, env, function)
        match node:
            case ast.Assign(targets=[target], value=value):
                return _bound(env, target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                return _bound(env, target, value)
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                more = [a + b for a in env.get(name, [VALUE]) for b in texts(value, env)]
                return {**env, name: more[:MOST]}
            case ast.Return(value=ast.expr() as value) if ANSWERS.fullmatch(function):
                self._say(node, texts(value, env))
        if isinstance(node, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            return None
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return None if _called(node.value) in ENDS - {"error"} else env
        blocks = _blocks(node)
        return _merged([self.block(b, dict(env), function) for b in blocks]) if blocks else env

    def _definition(self, node: ast.stmt, env: Env) -> None:
        inner = dict(env)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                inner.pop(argument.arg, None)
        self.block(node.body, inner, node.name)

    def _expression(self, node: ast.AST, env: Env, function: str) -> None:
        for child in ast.walk(node):
            if isinstance(child, ast.NamedExpr):
                env[child.target.id] = texts(child.value, env)
            elif isinstance(child, ast.Call):
                self._call(child, env)
            elif isinstance(child, ast.Yield) and "conflicts" in function:
                if not isinstance(child.value, ast.Tuple):  # a sentence that names its field
                    self._say(child, texts(child.value, env))
                    continue
                parts = itertools.product(*(texts(x, env) for x in child.value.elts))
                self._say(child, [f"`{each[0]}`: {each[1]}" for each in parts if len(each) == 2])

    def _call(self, node: ast.Call, env: Env) -> None:
        name = _called(node)
        arguments = [a for a in node.args if not _is_class(a)]
        if name in FORM and len(arguments) >= 2:
            fields = [[VALUE]] if len(arguments) == 2 else [texts(arguments[-3], env)]
            wanted, got = (texts(a, env) for a in arguments[-2:])
            for f, w, g in itertools.product(*fields, wanted, got):
                self._say(node, [f"`{f}`: expected {w}, got {g}"])
        elif name in SAYS | FORM and arguments:
            texts_ = itertools.chain.from_iterable(texts(a, env) for a in arguments[:2])
            self._say(node, [re.sub(r"%[sd]", VALUE, text) for text in texts_])

    def _say(self, node: ast.AST, found: list[str]) -> None:
        self.found += [Sentence(self.path, node.lineno, text) for text in found]


def texts(node: ast.expr | None, env: Env) -> list[str]:
    """What an expression may be as a text.

    Args:
        node: the expression.
        env: what names may be.
    """
    match node:
        case ast.Constant(value=value):
            found = [str(value)]
        case ast.JoinedStr(values=values):
            parts = [texts(getattr(v, "value", v) if _plain(v) else v, env) for v in values]
            found = ["".join(each) for each in itertools.product(*parts)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            found = [a + b for a in texts(left, env) for b in texts(right, env)]
        case ast.IfExp(body=body, orelse=orelse):
            found = texts(body, env) + texts(orelse, env)
        case ast.BoolOp(values=values):
            found = [text for value in values for text in texts(value, env)]
        case ast.Name(id=name):
            found = env.get(name, [VALUE])
        case _:
            found = [VALUE]
    found = list(dict.fromkeys(found))
    return found if len(found) <= MOST else [VALUE]


def table(node: ast.Dict, env: Env) -> list[str]:
    """The values of a table of reasons."""
    found = []
    for value in node.values:
        many = isinstance(value, ast.Call) and _called(value) == "fromkeys"
        found += texts(value.args[1] if many else value, env)
    return list(dict.fromkeys(found))


def _plain(value: ast.expr) -> bool:
    """Of an f-string: a name or a choice, whose text may be known."""
    return isinstance(value, ast.FormattedValue) and isinstance(
        value.value, (ast.Name, ast.IfExp, ast.Constant)
    )


def _bound(env: Env, target: ast.expr, value: ast.expr) -> Env:
    match target, value:
        case ast.Name(id=name), _:
            return {**env, name: texts(value, env)}
        case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
            for one, each in zip(names, values, strict=True):
                env = _bound(env, one, each)
            return env
        case ast.Tuple(elts=names), ast.IfExp(body=ast.Tuple(), orelse=ast.Tuple()):
            left, right = _bound(env, target, value.body), _bound(env, target, value.orelse)
            return _merged([left, right])
    return {**env, **{n.id: [VALUE] for n in ast.walk(target) if isinstance(n, ast.Name)}}


def _merged(ends: list[Env | None]) -> Env | None:
    """What names may be where several ways meet."""
    ways = [end for end in ends if end is not None]
    if not ways:
        return None
    names = dict.fromkeys(itertools.chain.from_iterable(ways))
    return {n: list(dict.fromkeys(t for way in ways for t in way.get(n, []))) for n in names}


def _blocks(node: ast.stmt) -> list[list[ast.stmt]]:
    """The ways through a compound statement; [] for any other."""
    match node:
        case ast.If(body=body, orelse=orelse):
            return [body, orelse]
        case ast.For(body=body, orelse=orelse) | ast.While(body=body, orelse=orelse):
            return [body, orelse]
        case ast.With(body=body):
            return [body]
        case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=last):
            return [body + orelse + last, *(h.body + last for h in handlers)]
        case ast.Match(cases=cases):
            return [[], *(case.body for case in cases)]
    return []


def _own_expressions(node: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement, without those of statements inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.match_case):
            if child.guard is not None:
                yield child.guard
        elif not isinstance(child, (ast.stmt, ast.excepthandler)):
            yield child


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _is_class(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id[0].isupper() and not node.id.isupper()


def tables(path: Path) -> Iterator[Sentence]:
    """The reasons in the tables of a source.

    Args:
        path: of the source.
    """
    env: Env = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign):
            continue
        (target,) = node.targets
        if getattr(target, "id", "") in TABLES and isinstance(node.value, ast.Dict):
            for text in table(node.value, env):
                yield Sentence(str(path.relative_to(ROOT)), node.lineno, text)
        env = _bound(env, target, node.value)
