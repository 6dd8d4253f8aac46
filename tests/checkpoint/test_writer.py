"""The streaming writer against arbitrary shard layouts: what changed is right, everything else is the same bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from portllm.algebra import lora
from portllm.checkpoint import writer
from portllm.checkpoint.headers import Header, read_header
from portllm.checkpoint.plan import Change
from portllm.checkpoint.writer import Job, Meter, copy_file, write_shards, write_subset
from portllm.errors import CheckpointError, PatchError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def change(header: Header, name: str, a: torch.Tensor, b: torch.Tensor, transposed: bool = False) -> Change:
    """A change without a patch directory behind it."""
    pair: Any = SimpleNamespace(a=a, b=b, scaling=0.5, module=name)
    return Change(header.tensors[name], pair, transposed)


def sha256(data: bytes | torch.Tensor) -> str:
    if isinstance(data, torch.Tensor):
        data = data.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


@st.composite
def layouts(draw: st.DrawFn) -> list[list[tuple[torch.dtype, tuple[int, ...], bool]]]:
    """Shards of (dtype, shape, changed or not); empty tensors, scalars and odd sizes among them."""
    shape = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    plain = st.tuples(st.sampled_from([*DTYPES, torch.int64, torch.bool]), shape, st.just(False))
    matrix = st.tuples(st.sampled_from(DTYPES), st.tuples(st.integers(0, 9), st.integers(0, 9)), st.just(True))
    return draw(st.lists(st.lists(plain | matrix, min_size=1, max_size=4), min_size=1, max_size=4))


@given(layout=layouts(), block=st.sampled_from([1, 5, 1 << 18]), piece=st.sampled_from([1, 7, 1 << 20]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout(
    layout: list[list[tuple[torch.dtype, tuple[int, ...], bool]]],
    block: int,
    piece: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    torch.manual_seed(len(layout))
    shards, changes, before, after = {}, {}, {}, {}
    for i, shard in enumerate(layout):
        tensors = {f"{i}.{j}": torch.randn(shape).mul_(3).to(dtype) for j, (dtype, shape, _) in enumerate(shard)}
        save_file(tensors, folder / f"{i}.safetensors", metadata={"format": "pt", "shard": str(i)})
        header = read_header(folder / f"{i}.safetensors")
        shards[folder / f"out-{i}.safetensors"] = header
        for j, (_, shape, changed) in enumerate(shard):
            name = f"{i}.{j}"
            before[name] = after[name] = tensors[name]
            if changed:
                a, b = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
                changes[name] = change(header, name, a, b)
                after[name] = lora.add_delta(tensors[name], a, b, 1.5)
    seen: list[tuple[int, int]] = []
    meter = Meter(sum(h.size for h in shards.values()), lambda done, total: seen.append((done, total)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "BLOCK_ELEMENTS", block)
        patched.setattr(writer, "PIECE_BYTES", piece)
        written = write_shards(shards, Job(changes, 3.0, {}, meter))
    for target, header in shards.items():
        result = written[target]
        assert target.read_bytes()[: header.data_start] == header.path.read_bytes()[: header.data_start]
        assert result.sha256 == sha256(target.read_bytes())
        for name, tensor in load_file(target).items():
            assert torch.equal(tensor, after[name])
            assert result.before[header.tensors[name]] == sha256(before[name])
            assert result.after[header.tensors[name]] == sha256(after[name])
    assert seen[-1] == (meter.total, meter.total)
    assert seen == sorted(seen)


@pytest.fixture
def one(tmp_path: Path) -> Header:
    torch.manual_seed(0)
    save_file({"w": torch.randn(40, 30), "x": torch.randn(10)}, tmp_path / "one.safetensors")
    return read_header(tmp_path / "one.safetensors")


def job(changes: dict[str, Change], known: dict[Any, str] | None = None) -> Job:
    return Job(changes, 1.0, known or {}, Meter(0))


def test_transposed_weights_get_the_transposed_update(one: Header, tmp_path: Path) -> None:
    a, b = torch.randn(2, 40), torch.randn(30, 2)
    write_shards({tmp_path / "out": one}, job({"w": change(one, "w", a, b, transposed=True)}))
    expected = lora.add_delta(load_file(one.path)["w"].T.contiguous(), a, b, 0.5).T
    assert torch.equal(load_file(tmp_path / "out")["w"], expected)


def test_known_digests_are_taken_as_they_are(one: Header, tmp_path: Path) -> None:
    known = {one.tensors["x"]: "1" * 64, one.tensors["w"]: "2" * 64}
    written = write_shards(
        {tmp_path / "out": one}, job({"w": change(one, "w", torch.ones(1, 30), torch.ones(40, 1))}, known)
    )
    assert written[tmp_path / "out"].before == known
    assert written[tmp_path / "out"].after[one.tensors["x"]] == "1" * 64
    assert written[tmp_path / "out"].after[one.tensors["w"]] == sha256(load_file(tmp_path / "out")["w"])


def test_where_the_kernel_cannot_copy_we_do(one: Header, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    write_shards({tmp_path / "out": one}, job({}))
    assert (tmp_path / "out").read_bytes() == one.path.read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows_is_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"w": torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)}, tmp_path / "one.safetensors")
    header = read_header(tmp_path / "one.safetensors")
    big = torch.full((1, 4), torch.finfo(dtype).max, dtype=torch.float64)
    with pytest.raises(PatchError, match="w plus the patch is not finite"):
        write_shards({tmp_path / "out": header}, job({"w": change(header, "w", big, torch.ones(4, 1))}))


def test_one_failing_shard_stops_the_others(one: Header, tmp_path: Path) -> None:
    def fail(*_: int) -> None:
        raise OSError(28, "No space left on device")

    shared = Job({}, 1.0, {}, Meter(0, fail))
    with pytest.raises(OSError, match="No space left"):
        write_shards({tmp_path / f"out-{i}": one for i in range(9)}, shared)
    assert shared.meter.cancelled.is_set()


def test_an_input_that_changes_under_us_is_refused(one: Header, tmp_path: Path) -> None:
    with one.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        write_shards({tmp_path / "out": one}, job({}))
    os.truncate(one.path, one.data_start + 3)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        write_shards({tmp_path / "out": one}, job({}))


def test_torchs_settings_are_as_before(one: Header, tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("medium")
    threads = torch.get_num_threads()
    try:
        write_shards({tmp_path / "out": one}, job({}))
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision("highest")


def test_copy_file_follows_links(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"bytes" * 300_000)
    (tmp_path / "link").symlink_to(tmp_path / "source")
    digest = copy_file(tmp_path / "link", tmp_path / "copy", Meter(0))
    assert digest == sha256((tmp_path / "source").read_bytes())
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()
    assert not (tmp_path / "copy").is_symlink()


@pytest.mark.parametrize("names", [["w"], ["x"], ["w", "x"], []])
def test_a_subset_is_a_file_of_its_own(names: list[str], one: Header, tmp_path: Path) -> None:
    meter = Meter(one.size)
    digest = write_subset(one, names, tmp_path / "out", meter)
    assert digest == sha256((tmp_path / "out").read_bytes())
    assert meter.done == meter.total
    whole = load_file(one.path)
    found = load_file(tmp_path / "out")
    assert set(found) == set(names)
    assert all(torch.equal(found[name], whole[name]) for name in names)
