"""Flags generated from the sections of params.py, so that a flag, a key and a default never disagree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import click

from portllm import params
from portllm.cli.running import Common

Command = TypeVar("Command", bound=Callable[..., Any])
Section = TypeVar("Section")

DIRECTORY = click.Path(path_type=Path)
SEPARATOR = "__"
# a nested section whose flags carry no prefix: --learning-rate, not --optim-learning-rate
PLAIN = "optim"


def of_section(name: str, kind: type[Any], *, skip: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """A decorator that gives a command one flag per field of the section `kind` (mappings and `skip` left out)."""

    def decorate(command: Command) -> Command:
        for dest, flag, hint, default in reversed(list(_leaves(kind, ()))):
            if dest[0] in skip:
                continue
            key = ".".join((name, *dest))
            option = click.option(
                flag, SEPARATOR.join(dest), type=_type(hint), default=None, help=f"{key} [default: {default}]"
            )
            command = option(command)
        return command

    return decorate


def apply(section: Section, flags: Mapping[str, Any], *, where: str) -> Section:
    """`section` (from params.yaml or the defaults) with the flags that were given. Raises ParamsError."""
    tree: dict[str, Any] = {}
    for dest, value in flags.items():
        if value is None:
            continue
        *groups, leaf = dest.split(SEPARATOR)
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return params.override(section, tree, where=where) if tree else section


def _leaves(kind: type[Any], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, Any, Any]]:
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint, key = hints[item.name], item.name.rstrip("_")
        if dataclasses.is_dataclass(hint):
            yield from _leaves(cast(type[Any], hint), (*prefix, key))
        elif get_origin(hint) is not Mapping:
            words = [p for p in (*prefix, key) if p != PLAIN]
            flag = "--" + "-".join(words).replace("_", "-")
            yield (*prefix, key), f"{flag}/--no-{flag[2:]}" if hint is bool else flag, hint, _default(item)


def _default(item: dataclasses.Field[Any]) -> Any:
    made = item.default
    if item.default_factory is not dataclasses.MISSING:
        made = item.default_factory()
    return ",".join(made) if isinstance(made, tuple) else made


def _type(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return click.Choice(list(get_args(hint)))
    return COMMA_LIST if get_origin(hint) is tuple else hint


class CommaList(click.ParamType[list[str]]):
    """Comma-separated words, as `q_proj,v_proj`."""

    name = "a,b,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:  # noqa: ARG002
        words = [w.strip() for w in value.split(",")] if isinstance(value, str) else list(value)
        if not all(words):
            self.fail(f"{value!r} has an empty item; expected names parted by commas", param, ctx)
        return words


COMMA_LIST = CommaList()


JSON = click.option("--json", "as_json", is_flag=True, help="Exactly one JSON object on stdout.")
PARAMS = click.option(
    "--params", "params_file", type=DIRECTORY, help="params.yaml to read the section of this verb from."
)
COST = click.option("--cost", type=DIRECTORY, help="Write seconds and peak memory of this call to this JSON file.")
FORCE = click.option("--force", is_flag=True, help="Replace OUT when it exists.")
OUT = click.option(
    "--out", type=DIRECTORY, required=True, help="Directory to write; it appears complete or not at all."
)
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")


def common(command: Command) -> Command:
    """The options of every pipeline verb, handed to it as one `opts`."""

    @functools.wraps(command)
    def bundled(*, params_file: Path | None, cost: Path | None, as_json: bool, **rest: Any) -> Any:
        return command(opts=Common(params_file=params_file, cost=cost, as_json=as_json), **rest)

    for option in (JSON, COST, PARAMS):
        bundled = option(bundled)
    return cast(Command, bundled)
