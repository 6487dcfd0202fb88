"""From plain data to frozen dataclasses, with every mistake reported at once.

A leaf is checked by pydantic against its field's annotation, strictly (the text "5" is no number). A class's own
ValueError becomes one line of the report. An unknown key comes with the nearest known one. Unions of dataclasses are
told apart by a field in which each has its own literal (`name`, `form`), or by their keys.

Left out: pydantic's own models. Its dataclass support would do the walk, but not say on which line, not suggest, and
not tell apart the members of a union in the way a person reads them.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeGuard, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tailorpo.errors import UserError
from tailorpo.yaml_tree import Key, Tree, show


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """'; did you mean `steps`?' or nothing."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


class _Invalid:
    """Stands for a value whose mistakes have been noted already."""


_INVALID = _Invalid()


@dataclass(frozen=True)
class Binder:
    """Builds dataclasses from a tree and collects what is wrong with it in `tree.problems`."""

    tree: Tree

    def sections(self, kind: type) -> dict[str, Any]:
        """Those fields of `kind` that have no mistake, so that the others' do not hide what is wrong between these."""
        return self._fields(kind, self.tree.data, ())

    def _problem(self, key: Key, text: str) -> _Invalid:
        where = self.tree.where(key)
        self.tree.problems.append(f"{where}: {text}" if where else text)
        return _INVALID

    def _dataclass(self, kind: type, data: dict[str, Any], key: Key) -> Any:
        before = len(self.tree.problems)
        values = self._fields(kind, data, key)
        if len(self.tree.problems) > before:
            return _INVALID
        try:
            return kind(**values)
        except (ValueError, TypeError, UserError) as error:
            return self._problem(key, str(error))

    def _fields(self, kind: type, data: dict[str, Any], key: Key) -> dict[str, Any]:
        hints = get_type_hints(kind, include_extras=True)
        known = {item.name: item for item in fields(kind) if item.init}
        for name in data:
            if name not in known:
                hint = did_you_mean(name, list(known)) or f"; known are {_listed(known)}"
                self._problem((*key, name), f"unknown key{hint}")
        values: dict[str, Any] = {}
        for name, item in known.items():
            if name in data:
                before = len(self.tree.problems)
                value = self._value(hints[name], data[name], (*key, name))
                if len(self.tree.problems) == before:
                    values[name] = value
            elif item.default is MISSING and item.default_factory is MISSING:
                self._problem((*key, name), "missing")
        return values

    def _value(self, annotation: Any, value: Any, key: Key) -> Any:
        members = _members(annotation)
        kinds = [member for member in members if _is_dataclass(member)]
        item = _item(annotation)
        if item is not None and any(map(_is_dataclass, _members(item))):
            if not isinstance(value, list):
                return self._problem(key, f"got {show(value)}, expected a list")
            return tuple(self._value(item, each, (*key, index)) for index, each in enumerate(cast(list[Any], value)))
        if not kinds or (value is None and types.NoneType in members):
            return self._leaf(annotation, value, key)
        if isinstance(value, dict):
            data = cast(dict[str, Any], value)
            kind = self._choose(kinds, data, key)
            return _INVALID if kind is None else self._dataclass(kind, data, key)
        rest = [member for member in members if member not in kinds]
        if any(member is not types.NoneType for member in rest):
            return self._leaf(Union[tuple(rest)], value, key)  # noqa: UP007 (built from a list)
        return self._problem(key, f"got {show(value)}, expected a mapping with the keys {_listed(_keys(kinds))}")

    def _choose(self, kinds: Sequence[type], data: dict[str, Any], key: Key) -> type | None:
        """The member of a union that a mapping means, by the field in which each has its own literal name; where they
        have none, the one that has most of its keys."""
        if len(kinds) == 1:
            return kinds[0]
        hints = [get_type_hints(kind) for kind in kinds]
        tag = next((name for name in hints[0] if any(get_origin(hint.get(name)) is Literal for hint in hints)), None)
        if tag is None:
            return max(kinds, key=lambda kind: sum(item.name in data for item in fields(kind)))
        names = {name: kind for kind, hint in zip(kinds, hints, strict=True) for name in get_args(hint.get(tag))}
        open_ended = next((kind for kind, hint in zip(kinds, hints, strict=True) if hint.get(tag) is str), None)
        where = (*key, tag)
        if tag not in data:
            self._problem(where, f"missing; one of {_listed(names)}")
            return None
        got = data[tag]
        if isinstance(got, str) and got in names:
            return names[got]
        if isinstance(got, str) and ":" in got and open_ended is not None:
            return open_ended
        hint = did_you_mean(got, list(names)) if isinstance(got, str) else ""
        own = " or your own, as my_package.module:function" if open_ended is not None else ""
        self._problem(where, f"got {show(got)}, expected one of {_listed(names)}{own}{hint}")
        return None

    def _leaf(self, annotation: Any, value: Any, key: Key) -> Any:
        try:
            # In JSON a list may stand for a tuple even in strict mode, exactly as in a run file.
            return _adapter(annotation).validate_json(json.dumps(value))
        except ValidationError as error:
            return self._problem(key, explain(error, value))


def check_fields(instance: object) -> None:
    """Check the plain fields of a dataclass that was built from Python by the rules that hold for run files.

    Raises:
        ValueError: names every field that is wrong.
    """
    problems: list[str] = []
    for name, annotation in get_type_hints(type(instance), include_extras=True).items():
        if any(map(_is_dataclass, [*_members(annotation), *_members(_item(annotation))])):
            continue
        value = getattr(instance, name)
        try:
            _adapter(annotation).validate_python(value)
        except ValidationError as error:
            problems.append(f"{name}: {explain(error, value)}")
    if problems:
        raise ValueError("; ".join(problems))


def plain(value: Any) -> Any:
    """A dataclass tree as the mappings, lists and scalars of a run file."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value) if item.init}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in cast(Mapping[object, Any], value).items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in cast(Sequence[Any], value)]
    return value


def explain(error: ValidationError, value: Any) -> str:
    """What pydantic found, as one line: what was got and what is accepted."""
    details = error.errors(include_url=False, include_input=True)
    # Of a union's members those that got further into the value (an item of a list) meant it.
    inner = [detail for detail in details if any(isinstance(part, int) for part in detail["loc"])]
    chosen = inner or details
    parts = [_expected(detail["type"], detail.get("ctx", {}), detail["msg"]) for detail in chosen]
    expected = " or ".join(dict.fromkeys(parts))
    if inner:
        index = next(part for part in inner[0]["loc"] if isinstance(part, int))
        return f"item {index + 1}: got {show(inner[0]['input'])}, expected {expected}"
    literals = re.findall(r"'([^']*)'", " ".join(str(detail.get("ctx", {}).get("expected")) for detail in chosen))
    hint = did_you_mean(value, literals) if isinstance(value, str) else ""
    return f"got {show(value)}, expected {expected}{hint}"


def _expected(kind: str, context: Mapping[str, Any], message: str) -> str:
    match kind:
        case "int_type" | "int_from_float":
            return "a whole number"
        case "float_type":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "string_type":
            return "text"
        case "bool_type":
            return "true or false"
        case "none_required":
            return "null"
        case "tuple_type" | "list_type":
            return "a list"
        case "dict_type" | "mapping_type":
            return "a mapping"
        case "literal_error":
            return str(context["expected"]).replace("'", "")
        case "greater_than":
            return f"more than {context['gt']:g}"
        case "greater_than_equal":
            return f"at least {context['ge']:g}"
        case "less_than":
            return f"less than {context['lt']:g}"
        case "less_than_equal":
            return f"at most {context['le']:g}"
        case "missing":
            return "one more item in the list"
        case "too_long":
            return f"at most {context['max_length']} items"
        case "too_short":
            return f"at least {context['min_length']} items"
        case _:
            return message.removeprefix("Value error, ")


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))


def _is_dataclass(annotation: Any) -> TypeGuard[type]:
    return isinstance(annotation, type) and is_dataclass(annotation)


def _members(annotation: Any) -> list[Any]:
    """The members of a union, flat, or the annotation alone; metadata is kept on leaves only."""
    if get_origin(annotation) is Annotated:
        inner = _members(get_args(annotation)[0])
        return inner if len(inner) > 1 or _is_dataclass(inner[0]) else [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [leaf for member in get_args(annotation) for leaf in _members(member)]
    return [annotation]


def _item(annotation: Any) -> Any:
    """X of tuple[X, ...], otherwise None."""
    arguments = get_args(annotation)
    return arguments[0] if get_origin(annotation) is tuple and arguments[1:] == (...,) else None


def _keys(kinds: Sequence[type]) -> list[str]:
    return list(dict.fromkeys(item.name for kind in kinds for item in fields(kind)))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
