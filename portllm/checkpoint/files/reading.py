"""Input files read safely: opened once their kind is known, read completely, JSON parsed strictly."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from portllm.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # safetensors' own limit of a header

KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is read into a CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); check the path, its permissions and the disk"
        ) from error
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{path}: cannot be read ({error}); check the path") from error


def open_input(path: Path) -> BinaryIO:
    """Open `path` for reading, unbuffered, following links. Raises CheckpointError, also where it is not a file.

    The kind is checked first: opening a FIFO blocks until a writer comes, and a device has no end.
    """
    with reading(path):
        mode = path.stat().st_mode
        for is_kind, kind in KINDS:
            if is_kind(mode):
                raise CheckpointError(f"{path}: cannot be read: expected a file, found {kind}; fetch it again")
        return path.open("rb", buffering=0)


def read_exactly(handle: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from byte `offset` of the file. Raises CheckpointError where it ends first or the disk fails."""
    done = 0
    while done < len(buffer):
        with reading(path):
            count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path}: became shorter while it was read; leave inputs alone and try again")
        done += count


def read_json_object(path: Path, *, once: bool = False) -> dict[str, Any]:
    """Return a JSON file that holds an object; `once` refuses a key that occurs twice. Raises CheckpointError."""
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = True  # opening it says what is wrong
    if not exists:
        raise CheckpointError(f"{path.parent}: has no {path.name}; is this the right directory?")
    with open_input(path) as file, reading(path):
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=unique if once else None)
        json.dumps(tree, ensure_ascii=False).encode()  # JSON can spell half a character, which no file can hold
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); fetch the file again") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(tree).__name__}; fetch the file again")
    return tree


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError for a key that occurs twice, which JSON allows."""
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"{key} occurs twice")
        tree[key] = value
    return tree


def kind_of(path: Path) -> str:
    """Return what is at `path` where a directory was expected, for an error: a file or nothing."""
    return "a file" if path.exists() else "nothing"
