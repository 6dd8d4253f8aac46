"""A fingerprint tells tensors apart and nothing else; its cache is never believed about a changed file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from portllm.checkpoint.files import hashing as module
from portllm.checkpoint.files.hashing import cached, combine, digests, fingerprint
from portllm.checkpoint.files.headers import read_header, read_headers
from portllm.errors import PortllmError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(0, 2)}
Make = Callable[..., Path]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of this very second be cached: otherwise every test would have to wait."""
    monkeypatch.setattr(module, "SETTLED_NS", 0)


def test_sharding_order_and_metadata_do_not_matter(tmp_path: Path, make_checkpoint: Make) -> None:
    one = fingerprint(make_checkpoint(tmp_path / "one", TENSORS))
    assert one == fingerprint(make_checkpoint(tmp_path / "two", TENSORS, shards=[["c"], ["b", "a"]]))
    assert one == fingerprint(make_checkpoint(tmp_path / "three", TENSORS, config={"other": 1}))
    save_file(dict(reversed(TENSORS.items())), tmp_path / "one" / "model.safetensors", metadata={"k": "v"})
    assert one == fingerprint(tmp_path / "one")
    assert len(bytes.fromhex(one)) == 32


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "a": torch.arange(6.0).view(3, 2)},
        {**TENSORS, "a": -torch.arange(6.0).view(2, 3)},
        {**TENSORS, "b": torch.ones(4, dtype=torch.bfloat16).view(torch.float16)},
        {**TENSORS, "d": torch.ones(1)},
        {"a": TENSORS["a"], "b": TENSORS["b"]},
        {"a2": TENSORS["a"], "b": TENSORS["b"], "c": TENSORS["c"]},
    ],
)
def test_every_difference_matters(other: dict[str, torch.Tensor], tmp_path: Path, make_checkpoint: Make) -> None:
    one, two = make_checkpoint(tmp_path / "one", TENSORS), make_checkpoint(tmp_path / "two", other)
    assert fingerprint(one) != fingerprint(two)


def test_a_patch_has_one_too(tmp_path: Path, make_patch: Make) -> None:
    one = make_patch(tmp_path / "one", {"q": (torch.ones(2, 3), torch.ones(4, 2))})
    two = make_patch(tmp_path / "two", {"q": (torch.ones(2, 3), torch.zeros(4, 2))})
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.usefixtures("settled")
def test_the_cache_answers_for_an_unchanged_file(
    tmp_path: Path, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS, shards=[["a"], ["b", "c"]])
    first = fingerprint(folder)
    monkeypatch.setattr(module, "_tensor_digest", lambda *_: pytest.fail("read again"))
    assert fingerprint(folder) == first
    (tmp_path / "link").symlink_to(folder)
    assert fingerprint(tmp_path / "link") == first


@pytest.mark.usefixtures("settled")
def test_a_changed_file_is_never_answered_from_the_cache(tmp_path: Path, make_checkpoint: Make) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS)
    path = folder / "model.safetensors"
    first, stat = fingerprint(folder), path.stat()
    assert cached(read_header(path)) is not None
    with path.open("r+b") as file:  # same size, and its time put back
        file.seek(-1, os.SEEK_END)
        file.write(b"\x41")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cached(read_header(path)) is None
    assert fingerprint(folder) != first


@pytest.mark.usefixtures("settled")
def test_another_file_in_the_same_place_is_seen(tmp_path: Path, make_checkpoint: Make) -> None:
    one = make_checkpoint(tmp_path / "one", TENSORS)
    two = make_checkpoint(tmp_path / "two", {**TENSORS, "a": TENSORS["a"] + 1})
    first, second = fingerprint(one), fingerprint(two)
    stat = (one / "model.safetensors").stat()
    os.replace(two / "model.safetensors", one / "model.safetensors")
    os.utime(one / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(one) == second != first


def test_a_file_just_written_is_not_cached(tmp_path: Path, make_checkpoint: Make) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS)
    fingerprint(folder)
    assert cached(read_headers(folder)[0]) is None
    assert time.time_ns() - (folder / "model.safetensors").stat().st_mtime_ns < module.SETTLED_NS


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", [{}, {"kind": "sha256"}, {"kind": "blake4"}])
def test_digests_of_another_kind_are_not_believed(
    kind: dict[str, str], tmp_path: Path, make_checkpoint: Make, private_cache: Path
) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS)
    first = fingerprint(folder)
    (file,) = (private_cache / "portllm" / "fingerprints").iterdir()
    tree = json.loads(file.read_text())
    del tree["kind"]
    others = dict.fromkeys(tree["tensors"], "0" * 64)
    file.write_text(json.dumps({**tree, "tensors": others, **kind}))
    assert fingerprint(folder) == first
    file.write_text(json.dumps({**tree, "tensors": others, "kind": module.KIND}))
    assert fingerprint(folder) != first  # of our own kind they would have been


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"identity": 3, "tensors": 4}', "\x00", "same identity, bad digests"]
)
def test_a_broken_cache_is_ignored(text: str, tmp_path: Path, make_checkpoint: Make, private_cache: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS)
    first = fingerprint(folder)
    (file,) = (private_cache / "portllm" / "fingerprints").iterdir()
    if text.startswith("same"):
        tree = json.loads(file.read_text())
        text = json.dumps({**tree, "tensors": dict.fromkeys(tree["tensors"], "beef")})
    file.write_text(text)
    assert fingerprint(folder) == first
    assert json.loads(file.read_text())["tensors"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS)
    (tmp_path / "file").touch()
    first = fingerprint(folder)
    monkeypatch.setattr(module, "SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fingerprint(folder) == first


def test_combine_is_what_fingerprint_prints(tmp_path: Path, make_checkpoint: Make) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS, shards=[["a"], ["b", "c"]])
    assert combine(digests(read_headers(folder))) == fingerprint(folder)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PortllmError, match="is this a model directory"):
        fingerprint(tmp_path)
