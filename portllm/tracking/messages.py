"""The messages from a stage to its recorder: plain JSON, without secrets and without paths of the machine."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Message = dict[str, Any]

# user:password@ in an address, a key in a query, a hub token
_CREDENTIALS = (
    (re.compile(r"(\w+://)[^/@\s]+@"), r"\1"),
    (re.compile(r"([?&](?:\w*token|\w*key|sig\w*|password|secret)=)[^&\s]+", re.I), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***"),
)
_SECRET_KEY = re.compile(r"(^|[._-])(token|password|secret|api_key|apikey|credentials?)$", re.I)
_END_CHARACTERS = 300  # of a long error, at its start and at its end; both fit into a PortllmError
_NOT_IN_KEYS = re.compile(r"[^\w.\-/ ]")


@dataclass(frozen=True)
class Artifact:
    """Something that a stage read or wrote, identified by its fingerprint (hex digest); `name` is its project path."""

    kind: Literal["checkpoint", "patch", "ported", "dataset", "result"]
    name: str
    fingerprint: str


@dataclass(frozen=True)
class Dataset:
    """A dataset that a run used; MLflow shows it with its digest on the run's page."""

    name: str
    digest: str
    source: str
    context: Literal["training", "evaluation"] = "training"


@dataclass(frozen=True, kw_only=True)
class VersionRequest:
    """A ported checkpoint that passed its gate and becomes a version of the registered model `name`.

    `base`, `patch` and `ported` are fingerprints; `metrics` hold what the gate compared.
    """

    name: str
    checkpoint: Path
    release: str
    task: str
    ported: str
    base: str | None = None
    patch: str | None = None
    metrics: Mapping[str, float]
    alias: str | None = None
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version in the registry.

    `created` is false where the fingerprint was registered before; `note` says why the version has not the alias.
    """

    name: str
    version: str
    created: bool
    aliases: Sequence[str]
    note: str = ""


def plain(value: Any, root: Path) -> Any:
    """Return `value` as JSON types: dataclasses and mappings as objects, sequences as arrays, every text cleaned."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): "***" if _secret(key, item) else plain(item, root) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item, root) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return clean(str(value), root)


def clean(text: str, root: Path) -> str:
    """Return `text` without credentials; a path below `root` becomes relative, another absolute path its last part."""
    for pattern, safe in _CREDENTIALS:
        text = pattern.sub(safe, text)
    if os.path.isabs(text) and "\n" not in text:
        path = Path(os.path.normpath(text))
        return str(path.relative_to(root)) if path.is_relative_to(root) else f".../{path.name}"
    return text.replace(f"{root}{os.sep}", "")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters as `section.key` → text, in MLflow's alphabet."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}."))
        elif isinstance(value, list):
            flat[in_alphabet(path)] = ", ".join(map(str, value))
        else:
            flat[in_alphabet(path)] = str(value)
    return flat


def in_alphabet(key: str) -> str:
    """Return a metric's or parameter's name as MLflow accepts it: `acc,none` becomes `acc`, other commas dots."""
    return _NOT_IN_KEYS.sub("_", key.removesuffix(",none").replace(",", "."))


def portions(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Return `items` in lists of at most `size`."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def one_line(error: BaseException | str) -> str:
    """Return an error as one line fit for a terminal, without credentials.

    A long line loses its middle. Its start and its end stay, since the reason is in one of the two: an HTTP client
    states it after the address and its retries, a database before the statement and its values.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    for pattern, safe in _CREDENTIALS:
        text = pattern.sub(safe, text)
    return text if len(text) <= 2 * _END_CHARACTERS else f"{text[:_END_CHARACTERS]} […] {text[-_END_CHARACTERS:]}"


def _secret(key: object, value: object) -> bool:
    return isinstance(value, str) and value != "" and _SECRET_KEY.search(str(key)) is not None
