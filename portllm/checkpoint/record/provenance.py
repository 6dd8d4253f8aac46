"""The origin that a record contains: package versions, digests, names without machine paths."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable
from pathlib import Path

from portllm.checkpoint.files.hashing import Algorithm, file_digest
from portllm.checkpoint.files.links import SNAPSHOTS
from portllm.checkpoint.files.names import ADAPTER_CONFIG, CONFIG

# huggingface_hub's rules for a repository's name: 96 characters, no --, no .., not ending in .git
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_LONGEST = 96


# the packages whose arithmetic determines the bytes of a port
COMPUTING = ("numpy", "torch")


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of portllm and `packages`, without the label of a build.

    torch is 2.13.0 from one package index and 2.13.0+cpu from another: records contain 2.13.0 for both.
    """
    return {name: importlib.metadata.version(name).partition("+")[0] for name in ("portllm", *packages)}


def is_hub_name(name: str) -> bool:
    """Return whether the hub would accept `name` as OWNER/NAME, or NAME alone."""
    plain = len(name) <= _LONGEST and "--" not in name and ".." not in name and not name.endswith(".git")
    return plain and _HUB_NAME.fullmatch(name) is not None


def public_name(path: Path) -> str:
    """Return the name of `path` in a record: hub id for a hub cache, as given when relative, else its last component.

    Bytes that are not UTF-8 become U+FFFD, since a record cannot contain them.
    """
    path = Path(os.fsencode(path).decode("utf-8", "replace"))
    if path.parent.name == SNAPSHOTS and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    if path.is_absolute():
        return path.name
    return path.as_posix()


def revision(path: Path) -> str | None:
    """Return the pinned revision where `path` is a snapshot in a hub cache, otherwise None."""
    return path.name if path.parent.name == SNAPSHOTS else None


def configs(base: Path, patch: Path, algorithm: Algorithm = "blake3") -> dict[str, str]:
    """Return the digests of a port's other inputs: the base's config.json and the patch's adapter_config.json."""
    return {path.name: file_digest(path, algorithm) for path in (base / CONFIG, patch / ADAPTER_CONFIG)}


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of each file, by folder and name: `world_boolq/train.parquet`."""
    return {f"{path.parent.name}/{path.name}": file_digest(path) for path in paths}
