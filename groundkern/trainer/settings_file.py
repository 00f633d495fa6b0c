"""YAML settings, read so that whatever a file holds costs little and ends in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from groundkern.trainer.config import ConfigError, Loc
from groundkern.trainer.wording import VALUE, cut

MAX_BYTES = 2**18  # of a file
MAX_DEPTH = 20  # levels of nesting
MAX_VALUES = 10_000  # with every alias written out
WANTED = "expected settings"


def read_yaml(path: Path) -> tuple[dict, dict[Loc, int]]:
    """The mapping in a YAML file, loaded safely, and the line of each of its fields by path.

    Raises:
        ConfigError: not readable, not YAML, no mapping, a name twice, or larger than settings are.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML ({cut(str(error))})") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: {WANTED} of at most {MAX_BYTES:,} bytes, got more")
    try:
        values, node = parse_yaml(text, lambda line: f"{path}:{line}")
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none
        reason = cut(" ".join(str(error).split()), 300)
        raise ConfigError(f"{path}: not valid YAML ({reason})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(values).__name__}")
    return values, dict(_lines(node))


def parse_yaml(text: str, where: Callable[[int], str]) -> tuple[Any, yaml.Node | None]:
    """The plain value that a YAML text holds, and the nodes it was made of.

    Args:
        text: YAML.
        where: what starts an error message about a line, counted from 1.

    Raises:
        ConfigError: a name twice in one mapping; nested deeply; aliases that multiply.
        yaml.YAMLError, ValueError: no YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check(node, where)
        return loader.construct_document(node), node
    except RecursionError:
        line = where(loader.line + 1)
        raise ConfigError(f"{line}: {WANTED} of at most {MAX_DEPTH} levels, got more") from None
    finally:
        loader.dispose()


def _check(root: yaml.Node, where: Callable[[int], str]) -> None:
    """Bounds what a document can become, and refuses a name that a mapping has twice."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        line = where(node.start_mark.line + 1)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{line}: {WANTED} of at most {MAX_DEPTH} levels, got more")
        if id(node) in sizes and not sizes[id(node)]:  # inside itself
            raise ConfigError(f"{line}: {WANTED} without an alias of what it is in, got one")
        if id(node) not in sizes:
            sizes[id(node)] = 0
            if isinstance(node, yaml.MappingNode):
                _check_names(node, where)
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in _children(node))
        if sizes[id(node)] > MAX_VALUES:
            raise ConfigError(
                f"{line}: {WANTED} of at most {MAX_VALUES:,} values, aliases written out, got more"
            )
        return sizes[id(node)]

    size(root, 1)


def _check_names(node: yaml.MappingNode, where: Callable[[int], str]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line, name = key.start_mark.line + 1, (key.tag, key.value)
        if name in seen:
            raise ConfigError(
                f"{where(line)}: `{cut(key.value, VALUE)}`: expected a name once in a section, "
                f"got it twice, first in line {seen[name]}"
            )
        seen[name] = line


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _lines(node: yaml.MappingNode, above: Loc = ()) -> Iterator[tuple[Loc, int]]:
    for key, value in node.value:
        loc = (*above, key.value if isinstance(key, yaml.ScalarNode) else "")
        yield loc, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, loc)
