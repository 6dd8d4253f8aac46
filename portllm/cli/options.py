"""Flags generated from the sections of params.py, so that a flag, its key and its default are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import click

from portllm.cli.running import Common
from portllm.parsing import leaves, with_values

Command = TypeVar("Command", bound=Callable[..., Any])
Section = TypeVar("Section")

DIRECTORY = click.Path(path_type=Path)
# joins a leaf's path to the name of a click parameter; no field's name holds two underscores
SEPARATOR = "__"


def of_section(name: str, kind: type[Any], *, skip: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Return a decorator that gives a command one flag per leaf of the section `kind` (`skip` left out)."""

    def decorate(command: Command) -> Command:
        for leaf in reversed([leaf for leaf in leaves(kind) if leaf.path[0] not in skip]):
            flag = f"{leaf.flag}/--no-{leaf.flag[2:]}" if leaf.hint is bool else leaf.flag
            default = ",".join(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
            text = f"{'.'.join((name, *leaf.path))} [default: {default}]"
            option = click.option(flag, SEPARATOR.join(leaf.path), type=_type(leaf.hint), default=None, help=text)
            command = option(command)
        return command

    return decorate


def apply(section: Section, flags: Mapping[str, Any], *, where: str) -> Section:
    """Return `section` (from params.yaml or the defaults) with the flags that were given. Raises ParamsError."""
    return with_values(section, {tuple(dest.split(SEPARATOR)): value for dest, value in flags.items()}, where=where)


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
            self.fail(f"{value!r} has an empty item; expected names separated by commas", param, ctx)
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
    """Add the options of every pipeline verb to a command, which gets them as one `opts`."""

    @functools.wraps(command)
    def bundled(*, params_file: Path | None, cost: Path | None, as_json: bool, **rest: Any) -> Any:
        return command(opts=Common(params_file=params_file, cost=cost, as_json=as_json), **rest)

    for option in (JSON, COST, PARAMS):
        bundled = option(bundled)
    return cast(Command, bundled)
