"""A header is believed only when it describes its file exactly."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from portllm.checkpoint.files.headers import read_header
from portllm.errors import CheckpointError, HeaderError, PortllmError

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, tree: Any, data: int = 32, length: int | None = None) -> Path:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_agrees_with_safetensors(tmp_path: Path) -> None:
    tensors = {
        "x": torch.ones(2, 3),
        "y": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.ones(0, 4),
        "one": torch.tensor(1),
    }
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "f.safetensors")
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == set(tensors)
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        for name, entry in header.tensors.items():
            assert list(entry.shape) == file.get_slice(name).get_shape()
            assert entry.dtype == file.get_slice(name).get_dtype()
            assert entry.nbytes == tensors[name].numel() * tensors[name].itemsize


BAD = {
    "empty file": (b"", 0, 0),
    "length beyond the file": (GOOD, 32, 10_000),
    "length beyond the limit": (GOOD, 32, 2**63),
    "not JSON": (b"{]", 0, None),
    "not UTF-8": (b'{"\xff": 1}', 0, None),
    "a list": ([], 0, None),
    "nested too deep": (b"[" * 100_000, 0, None),
    "a name twice": (b'{"a": 1, "a": 1}', 0, None),
    "metadata not text": ({"__metadata__": {"k": 1}}, 0, None),
    "entry not an object": ({"a": 3}, 0, None),
    "extra field": (changed("a", more=1), 32, None),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, 4, None),
    "unknown dtype": (changed("a", dtype="F31"), 32, None),
    "dtype not text": (changed("a", dtype=["F32"]), 32, None),
    "negative size": (changed("a", shape=[-2, -3]), 32, None),
    "fractional size": (changed("a", shape=[2.0, 3]), 32, None),
    "boolean size": (changed("b", shape=[True]), 32, None),
    "shape not a list": (changed("b", shape="4"), 32, None),
    "shape overflows": (changed("a", shape=[2**40, 2**40]), 32, None),
    "range of one": (changed("b", data_offsets=[24]), 32, None),
    "range backwards": (changed("b", data_offsets=[32, 24]), 32, None),
    "range and shape differ": (changed("b", shape=[5]), 32, None),
    "gap": (changed("b", data_offsets=[26, 34]), 34, None),
    "overlap": (changed("b", data_offsets=[20, 28]), 32, None),
    "range beyond the file": (GOOD, 31, None),
    "bytes left over": (GOOD, 33, None),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, tmp_path: Path) -> None:
    tree, data, length = BAD[case]
    path = tmp_path / "f.safetensors"
    if tree == b"" and length == 0:
        path.write_bytes(b"abc")
    else:
        write(path, tree, data, length)
    with pytest.raises(HeaderError) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing.safetensors: cannot be read"):
        read_header(tmp_path / "nothing.safetensors")


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_never_end_in_anything_but_an_error_of_ours(data: st.DataObject, tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "f.safetensors", GOOD).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    (tmp_path / "f.safetensors").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        header = read_header(tmp_path / "f.safetensors")
    except PortllmError:
        return
    # the change was harmless: what is left still covers the file
    assert max((e.stop for e in header.tensors.values()), default=header.data_start) == header.size
