"""Reading YAML as plain data that remembers the line of every value, and replacing single values by `key.sub=value`.

YAML is read by the rules of version 1.2: `3e-5` is a number, `on` and `2024-01-01` are text, a repeated key is a
mistake.
Left out: merge keys and tags, which no run file needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from tailorpo.errors import RunFileError

Key = tuple[str | int, ...]
"""Where a value sits in the tree: ("reward", 0, "weight")."""

_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}
_MAX_DEPTH = 30
_MAX_VALUES = 100_000  # anchors that repeat each other can grow without bound


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, in which 3e-5 is text and `no` is false; scalars are resolved here instead."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's way to configure a loader)


@dataclass(frozen=True)
class Tree:
    """Plain data, with where each value was written and what was wrong with it.

    Attributes:
        lines: "line 12", or the override a value came from.
        names: how a key is called in messages, where that is not how it is stored.
    """

    data: dict[str, Any]
    lines: dict[Key, str] = field(default_factory=dict[Key, str])
    names: dict[Key, str] = field(default_factory=dict[Key, str])
    problems: list[str] = field(default_factory=list[str])

    def where(self, key: Key) -> str:
        """A readable name of a key, with its line where that is known."""
        renamed = max((old for old in self.names if key[: len(old)] == old), key=len, default=())
        name = ".".join([*([self.names[renamed]] if renamed else []), *map(str, key[len(renamed) :])])
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                return f"{name} ({self.lines[key[:length]]})"
        return name

    def located(self, problem: str) -> str:
        """A message that begins with a key, such as "batch.micro is 9", with the line of that key."""
        name = re.match(r"[\w.]*\w", problem)
        line = self.lines.get(_key(name[0])) if name else None
        return f"{name[0]} ({line}){problem[name.end() :]}" if name and line else problem


def read_yaml(text: str, source: str) -> Tree:
    """Parse a YAML mapping.

    Raises:
        RunFileError: it is not YAML, with line and column, or not a mapping.
    """
    tree = Tree({})
    try:
        node = _compose(text)
        data = None if node is None else _plain(node, (), tree, _MAX_DEPTH)
    except yaml.YAMLError as error:
        raise RunFileError(source, [_syntax(error)]) from error
    if not isinstance(data, dict):
        got = "nothing" if data is None else show(data)
        raise RunFileError(source, [f"expected a mapping of settings such as `updates: 100`, got {got}"])
    tree.data.update(cast(dict[str, Any], data))
    return tree


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _syntax(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {reason}"
    return f"not valid YAML: {' '.join(str(error).split())}"


def _plain(node: yaml.Node, key: Key, tree: Tree, depth: int) -> Any:
    """A YAML node as None, bool, int, float, str, list or dict."""
    if depth == 0 or len(tree.lines) > _MAX_VALUES:
        raise yaml.MarkedYAMLError(problem="nested too deeply or too long", problem_mark=node.start_mark)
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in {"str", "seq", "map"}:
        tree.problems.append(f"{tree.where(key)}: tags such as {node.tag} are not accepted; write plain values")
        return None
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            tree.lines[(*key, index)] = _line(item)
        return [_plain(item, (*key, index), tree, depth - 1) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for name_node, value in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                tree.problems.append(f"{_line(name_node)}: a key must be a word, not a list or mapping")
                continue
            name = str(name_node.value)
            if name in result:
                tree.problems.append(f"{tree.where((*key, name))}: written a second time on {_line(name_node)}")
            tree.lines[(*key, name)] = _line(name_node)
            result[name] = _plain(value, (*key, name), tree, depth - 1)
        return result
    return _scalar(str(node.value), plain=getattr(node, "style", None) is None)


def _scalar(text: str, *, plain: bool) -> str | int | float | bool | None:
    kind = next((kind for kind, pattern in _SCALARS.items() if plain and pattern.fullmatch(text)), "str")
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int" if len(text) < 300:  # Python refuses to read numbers of thousands of digits
            return int(text, 16 if text.startswith("0x") else 10)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case _:
            return text


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def override(tree: Tree, assignments: Sequence[str]) -> None:
    """Replace values in place; each assignment reads `key.sub=value`, its value YAML, a list item's key its number."""
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        key = _key(name.strip())
        origin = f"`{assignment}`"
        if not equals or not key or "" in key:
            tree.problems.append(f"{origin}: an override reads key.sub=value, for example sampler.steps=10")
            continue
        try:
            node = _compose(text)
            scratch = Tree({})
            value = None if node is None else _plain(node, key, scratch, _MAX_DEPTH)
        except yaml.YAMLError as error:
            tree.problems.append(f"{origin}: the value is {_syntax(error).partition(': ')[2] or 'not valid YAML'}")
            continue
        tree.problems.extend(f"{origin}: {problem}" for problem in scratch.problems)
        problem = _place(tree.data, key, value)
        if problem is not None:
            tree.problems.append(f"{origin}: {problem}")
            continue
        for old in [old for old in tree.lines if old[: len(key)] == key]:
            del tree.lines[old]
        for length in range(1, len(key)):
            tree.lines.setdefault(key[:length], origin)
        tree.lines[key] = origin


def _key(name: str) -> Key:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _place(data: dict[str, Any], key: Key, value: Any) -> str | None:
    """Set data[key[0]][key[1]]... = value, making mappings on the way; what prevents it, if anything."""
    here: Any = data
    for depth, part in enumerate(key):
        name = ".".join(str(step) for step in key[:depth])
        if isinstance(here, list):
            length = len(cast(list[Any], here))
            if not isinstance(part, int) or part >= length:
                return f"`{name}` is a list; its keys are 0 to {length - 1}"
            step: Any = part
        elif isinstance(here, dict):
            step = str(part)
            cast(dict[str, Any], here).setdefault(step, None)
        else:
            return f"`{name}` is {show(here)}, it has no keys"
        if depth == len(key) - 1:
            here[step] = value
            return None
        if here[step] is None:
            here[step] = {}
        here = cast(Any, here[step])
    return None


def show(value: Any) -> str:
    """A value as it may be quoted in a message: short, with its kind where that helps."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        keys = ", ".join(map(str, cast(Mapping[str, Any], value)))
        return f"a mapping with the keys {keys}" if keys else "an empty mapping"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
