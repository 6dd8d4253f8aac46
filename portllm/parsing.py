"""A section of params.yaml: a plain tree read into a frozen dataclass, changed, checked, and written as a tree again.

An unknown key, an ill-typed value or a number out of range is an error that names the key. Each field has one name in
three places: `lora.target_modules` in params.yaml, `--lora-target-modules` on the command line, and
`lora_target_modules=` in Python.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from portllm.errors import ParamsError
from portllm.suggestions import nearest

Section = TypeVar("Section")
Rule = tuple[str, Callable[[float], bool]]

ONE: Rule = ("1 or more", lambda value: 1 <= value < math.inf)
ZERO: Rule = ("0 or more", lambda value: 0 <= value < math.inf)
BELOW_ONE: Rule = ("a share from 0, below 1", lambda value: 0 <= value < 1)
SHARE: Rule = ("a share from 0 to 1", lambda value: 0 <= value <= 1)

# a nested section whose fields have no prefix in a flag: --learning-rate, not --optim-learning-rate
PLAIN = "optim"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One field of a section that is no mapping: where it stands (`path`), its type and its default."""

    path: tuple[str, ...]
    hint: Any
    default: Any

    @property
    def flag(self) -> str:
        """The option of the command line: `--lora-target-modules`."""
        return "--" + "-".join(self._words).replace("_", "-")

    @property
    def argument(self) -> str:
        """The keyword argument in Python: `lora_target_modules`; `as_` where the name is a keyword of the language."""
        name = "_".join(self._words)
        return f"{name}_" if keyword.iskeyword(name) else name

    @property
    def _words(self) -> list[str]:
        return [word for word in self.path if word != PLAIN]


def leaves(kind: type[Any], prefix: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield the leaves of the section `kind`, those of nested sections included."""
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        path = (*prefix, key_of(item.name))
        if dataclasses.is_dataclass(hints[item.name]):
            yield from leaves(typing.cast(type[Any], hints[item.name]), path)
        elif get_origin(hints[item.name]) is not Mapping:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            yield Leaf(path, hints[item.name], default)


def check(section: Any, where: str, rules: Mapping[str, Rule]) -> None:
    """Raise ParamsError for the first number of `section` that its rule does not allow (NaN: none does)."""
    for name, (expected, allowed) in rules.items():
        value = getattr(section, name)
        if not allowed(value):
            raise ParamsError(f"{where}.{name} is {value}; expected {expected}")


def with_values(section: Section, values: Mapping[tuple[str, ...], Any], *, where: str) -> Section:
    """Return `section` with the leaves at the given paths replaced; None keeps a value. Raises ParamsError."""
    tree: dict[str, Any] = {}
    for (*groups, leaf), value in values.items():
        if value is not None:
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
            node[leaf] = value
    return override(section, tree, where=where) if tree else section


def override(section: Section, values: Mapping[str, Any], *, where: str) -> Section:
    """Return `section` with some of its fields replaced, checked as if read from a file. Raises ParamsError."""
    tree = {key_of(name): value for name, value in as_tree(section).items()}
    for key, value in values.items():
        both_nested = isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
        tree[key] = {**tree[key], **value} if both_nested else value
    return parse(type(section), tree, where=where, source="params")


def as_tree(section: Any) -> dict[str, Any]:
    """Return a section as plain dicts and lists, with the keys of params.yaml."""
    if not dataclasses.is_dataclass(section):
        raise TypeError(f"{section!r} is not a section")
    return {key_of(f.name): _plain(getattr(section, f.name)) for f in dataclasses.fields(section)}


def parse(kind: type[Section], tree: Any, *, where: str, source: str) -> Section:
    """Return `tree` (from YAML) as the dataclass `kind`. Raises ParamsError with the key and the nearest known one."""
    if not isinstance(tree, Mapping):
        raise ParamsError(f"{source}: {where or 'the top level'} must be a mapping, found {_type_of(tree)}")
    hints = get_type_hints(kind)
    fields = {key_of(f.name): f for f in dataclasses.fields(typing.cast(Any, kind))}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ParamsError(f"{source}: unknown key {path}{hint_of(str(key), fields, where)}")
        values[fields[key].name] = _convert(hints[fields[key].name], value, where=path, source=source)
    missing = [k for k, f in fields.items() if f.name not in values and _is_required(f)]
    if missing:
        raise ParamsError(f"{source}: {where or 'the top level'} lacks {', '.join(missing)}; add it")
    return kind(**values)


def hint_of(key: str, known: Mapping[str, Any], where: str) -> str:
    """Return the end of an error about an unknown key: the nearest known one, or all of them."""
    prefix = f"{where}." if where else ""
    near = nearest(key, known, cutoff=0.4)
    return f"; did you mean {prefix}{near}?" if near else f"; known here: {', '.join(prefix + k for k in known)}"


def key_of(name: str) -> str:
    """Return the key in params.yaml of a dataclass field: `as` for `as_`, which Python needs."""
    return name.rstrip("_")


def _convert(hint: Any, value: Any, *, where: str, source: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(Any, hint), value, where=where, source=source)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        return None if value is None else _convert(inner[0], value, where=where, source=source)
    if origin is Literal:
        return _choice(get_args(hint), value, where=where, source=source)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        item = get_args(hint)[0]
        return tuple(_convert(item, v, where=f"{where}[{i}]", source=source) for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, typing.Mapping):
        item = get_args(hint)[1]
        return {str(k): _convert(item, v, where=f"{where}.{k}", source=source) for k, v in value.items()}
    return _scalar(hint, value, where=where, source=source)


def _choice(choices: tuple[Any, ...], value: Any, *, where: str, source: str) -> Any:
    if value not in choices:
        raise ParamsError(f"{source}: {where} must be one of {', '.join(map(str, choices))}, found {value!r}")
    return value


def _scalar(hint: Any, value: Any, *, where: str, source: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 (no dot) as text; every user means the number
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = getattr(get_origin(hint) or hint, "__name__", str(hint))
    expected = {"tuple": "list", "Mapping": "mapping"}.get(expected, expected)
    raise ParamsError(f"{source}: {where} must be a {expected}, found {value!r}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_tree(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _type_of(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
