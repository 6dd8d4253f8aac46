"""The record files that make a directory complete: patch.json, port.json, release.json, dataset.json.

A directory with its record is complete, one without it is not. Records contain no absolute path, no host name and no
time: the same inputs give byte-identical records.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from portllm.checkpoint.files.hashing import Algorithm
from portllm.checkpoint.files.reading import read_json_object
from portllm.errors import CheckpointError

SCHEMA_VERSION = 1  # of all records but port.json, whose version 2 has BLAKE3 where version 1 has SHA-256
# fields of earlier versions, accepted and ignored: the commit is in MLflow
RETIRED = frozenset({"git_commit"})
Kind = TypeVar("Kind", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The origin of a checkpoint or patch: its name, its revision if any, and the fingerprint of its tensors."""

    name: str
    fingerprint: str | None
    revision: str | None = None
    quantisation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record file: indented JSON in field order; reading refuses unknown fields and wrong types."""

    FILE: ClassVar[str] = ""
    VERSIONS: ClassVar[tuple[int, ...]] = (SCHEMA_VERSION,)
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        """Write the record as the last file of `folder`."""
        (folder / self.FILE).write_text(dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls: type[Kind], folder: Path) -> Kind:
        """Return the record in `folder`. Raises CheckpointError when it is absent or not of this kind."""
        path = folder / cls.FILE
        if not os.path.lexists(path):
            raise CheckpointError(f"{folder}: has no {cls.FILE}, so it is not complete; make it again")
        return cls._from_tree(read_json_object(path), path)

    @classmethod
    def find(cls: type[Kind], folder: Path) -> Kind | None:
        """Return the record in `folder`, or None where it is absent. Raises CheckpointError for an invalid record."""
        # a link to nothing, for example, is an invalid record, not an absent one
        return cls.read(folder) if os.path.lexists(folder / cls.FILE) else None

    @classmethod
    def _from_tree(cls: type[Kind], tree: Mapping[str, Any], path: Path) -> Kind:
        hints = typing.get_type_hints(cls)
        tree = {key: value for key, value in tree.items() if key not in RETIRED}
        names = {f.name for f in dataclasses.fields(cls)}
        if tree.get("schema_version") not in cls.VERSIONS or not set(tree) <= names:
            raise CheckpointError(f"{path}: expected schema version {cls.VERSIONS[-1]} of {cls.FILE}; make it again")
        sources = {k for k, hint in hints.items() if Source in (hint, *typing.get_args(hint))}
        try:
            values: dict[str, Any] = {k: _source(v) if k in sources else v for k, v in tree.items()}
            record = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"{path}: {error}; make the directory again") from error
        if wrong := [k for k, v in values.items() if not _is(v, hints[k])]:
            raise CheckpointError(f"{path}: {wrong[0]} is of the wrong type, {tree[wrong[0]]!r:.60}; make it again")
        return record


def _source(tree: Any) -> Source | None:
    """Return a source from its JSON value in a record. Raises TypeError."""
    if tree is None:
        return None
    if not isinstance(tree, dict):
        raise TypeError(f"expected an object, found {tree!r:.60}")
    source = Source(**tree)
    hints = typing.get_type_hints(Source)
    if wrong := [k for k, v in vars(source).items() if not _is(v, hints[k])]:
        raise TypeError(f"{wrong[0]} is of the wrong type, {tree[wrong[0]]!r:.60}")
    return source


def _is(value: Any, hint: Any) -> bool:
    """Return whether a value read from JSON is of the type that a field declares."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is types.UnionType:
        return any(_is(value, arg) for arg in args)
    if args:
        return isinstance(value, dict) and all(_is(v, args[1]) for v in value.values())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


@dataclass(frozen=True, kw_only=True)
class PatchRecord(Record):
    """patch.json: the base, the data and the parameters that a patch was trained with."""

    FILE: ClassVar[str] = "patch.json"
    task: str
    base: Source
    fingerprint: str
    data: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PortRecord(Record):
    """port.json: the patch, the base, the parameters of the port, and every file written.

    `files` contains the digest of every file written, `configs` those of the base's config.json and the patch's
    adapter_config.json, which no fingerprint covers: BLAKE3, or SHA-256 in schema version 1.
    """

    FILE: ClassVar[str] = "port.json"
    VERSIONS: ClassVar[tuple[int, ...]] = (1, 2)
    schema_version: int = 2
    base: Source
    patch: Source
    trained_on: Source | None = None
    task: str | None = None
    method: str = "direct"
    output: str = "merged"
    scale: float = 1.0
    modules: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, int] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def completed(
        self, *, base_fingerprint: str, fingerprint: str, files: Mapping[str, str], tensors: Mapping[str, int]
    ) -> PortRecord:
        """Return the record with the facts that are available after writing; `files` sorted by name."""
        return dataclasses.replace(
            self,
            base=dataclasses.replace(self.base, fingerprint=base_fingerprint),
            fingerprint=fingerprint,
            files=dict(sorted(files.items())),
            tensors=tensors,
        )

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of the digests in `files` and `configs`."""
        return "sha256" if self.schema_version == 1 else "blake3"

    @property
    def algorithm_name(self) -> str:
        """The name of `algorithm`, for people."""
        return "SHA-256" if self.schema_version == 1 else "BLAKE3"


@dataclass(frozen=True, kw_only=True)
class ReleaseRecord(Record):
    """release.json: how a release was made, and its score before any patch (the base probe).

    `base` is the earlier release that a new one was trained from; `source` is the origin of a real release, and
    `changes` contains its differences from `base`.
    """

    FILE: ClassVar[str] = "release.json"
    fingerprint: str
    base: Source | None = None
    source: Source | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DatasetRecord(Record):
    """dataset.json: the splits that `prepare` wrote, their source, and its decisions.

    `digests` and `rows` are by split; `source` is `world`, `local` or a dataset of the hub at `revision`. `files`
    contains the sha256 of each file read; `decisions` counts what was changed, left out or detected.
    """

    FILE: ClassVar[str] = "dataset.json"
    dataset: str
    source: str
    revision: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    decisions: Mapping[str, int] = field(default_factory=dict)


def dumps(tree: Any) -> str:
    """Return JSON in the form of all files of portllm: indented, in field order, with a newline at the end."""
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
