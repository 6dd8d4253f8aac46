"""The safetensors files of a directory: which they are, and their headers, parsed and validated without torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, then the data. The JSON maps each name
to dtype, shape and a byte range counted from the start of the data. Format: safetensors' own README ("Format").
"""

from __future__ import annotations

import json
import math
import os
import shlex
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.files.names import ADAPTER_WEIGHTS, INDEX, PICKLE_SUFFIXES, SINGLE
from portllm.checkpoint.files.reading import MAX_JSON_BYTES, open_input, read_json_object, reading, unique
from portllm.checkpoint.files.tensors import BITS, TensorEntry, TensorFile
from portllm.errors import CheckpointError, HeaderError, UnsafeFileError

MAX_AXES = 64  # the limit of torch


@dataclass(frozen=True)
class Header(TensorFile):
    """A validated header: the tensors of the file in the order of their bytes."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Return the header of `path`. Raises CheckpointError, HeaderError when it does not describe its file."""
    with open_input(path) as handle:
        with reading(path):
            size = os.fstat(handle.fileno()).st_size
            prefix = handle.read(8)
        length = _length(prefix, size, path)
        with reading(path):
            text = handle.read(length)
    tree = _json(text, path)
    metadata = _metadata(tree.pop("__metadata__", {}), path)
    file = TensorFile(path, 8 + length, size)
    entries = sorted((_entry(name, value, file) for name, value in tree.items()), key=lambda e: (e.start, e.stop))
    _check_contiguous(entries, file)
    return Header(path, file.data_start, size, {e.name: e for e in entries}, metadata)


# --- one header ---


def _length(prefix: bytes, size: int, path: Path) -> int:
    if len(prefix) < 8:
        raise _bad(path, f"expected a safetensors file, found {size} bytes")
    length = int(struct.unpack("<Q", prefix)[0])
    if length > min(MAX_JSON_BYTES, size - 8):
        raise _bad(path, f"the header claims {length} bytes, expected at most {min(MAX_JSON_BYTES, size - 8)}")
    return length


def _json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        "".join(tree).encode()  # JSON can spell half a character, which no file can hold
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"the header is not valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise _bad(path, "the header is not a JSON object")
    return tree


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _bad(path, "__metadata__ must map text to text")
    return value


def _entry(name: str, value: Any, file: TensorFile) -> TensorEntry:
    path, start = file.path, file.data_start
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"tensor {name!r} has a malformed shape or byte range")
    if len(shape) > MAX_AXES or math.prod(n for n in shape if n) >= 2**63:
        raise _bad(path, f"tensor {name!r} has a shape of {len(shape)} axes that no memory holds")
    expected = math.prod(shape) * BITS[dtype]
    if expected != 8 * (offsets[1] - offsets[0]):
        raise _bad(path, f"tensor {name!r} needs {expected // 8} bytes, its range holds {offsets[1] - offsets[0]}")
    return TensorEntry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1], file)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_contiguous(entries: list[TensorEntry], file: TensorFile) -> None:
    path, at, size = file.path, file.data_start, file.size
    for entry in entries:
        if entry.start != at:
            raise _bad(path, f"tensor {entry.name!r} starts at byte {entry.start}, expected {at} (gap or overlap)")
        at = entry.stop
    if at != size:
        raise _bad(path, f"the header describes {at} bytes, the file has {size} (cut short or added to)")


def _bad(path: Path, why: str) -> HeaderError:
    return HeaderError(f"{path}: {why}; fetch the file again")


# --- the files of a directory ---


def read_headers(folder: Path) -> list[Header]:
    """Return the headers of a checkpoint or patch directory. Raises CheckpointError."""
    names = [ADAPTER_WEIGHTS] if (folder / ADAPTER_WEIGHTS).is_file() else shard_names(folder)
    return [read_header(folder / name) for name in names]


def shard_names(path: Path) -> list[str]:
    """Return the names of the checkpoint's safetensors files, sorted. Raises CheckpointError, UnsafeFileError."""
    with reading(path):
        single, index = (path / SINGLE).is_file(), (path / INDEX).is_file()
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if single and index and set(_weight_map(path).values()) != {SINGLE}:
        raise CheckpointError(
            f"{path}: has both {SINGLE} and {INDEX}, which contradict each other; remove the stale one"
        )
    if single:
        return [SINGLE]
    if index:
        return sorted(set(_weight_map(path).values()))
    if pickles:
        code = (
            "import sys; from transformers import AutoModelForCausalLM as M; "
            "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
        )
        command = shlex.join(["python", "-c", code, str(path), "NEW_DIR"])
        raise UnsafeFileError(f"{path / pickles[0]}: is a pickle file, expected {SINGLE}; convert it with: {command}")
    raise CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}; is this a model directory?")


def check_index(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError where an index names other tensors than its shards hold, or another file of one."""
    if not (path / INDEX).is_file():
        return
    weight_map = _weight_map(path)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{path / INDEX}: tensor {name} is not in {file}; fetch the checkpoint again")
    if extra := sorted(set(tensors) - set(weight_map)):
        raise CheckpointError(
            f"{path / INDEX}: does not name {extra[0]}, which its shards hold; fetch the checkpoint again"
        )


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path / INDEX, once=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path / INDEX}: weight_map must map tensor names to file names; fetch the file again")
    if not weight_map:
        raise CheckpointError(f"{path / INDEX}: weight_map is empty; fetch the file again")
    for name in set(weight_map.values()):
        if name != Path(name).name or name in (".", "..") or "\0" in name or not name.endswith(".safetensors"):
            raise UnsafeFileError(
                f"{path / INDEX}: names the file {name!r}, expected a safetensors file next to it; do not trust it"
            )
    return weight_map
