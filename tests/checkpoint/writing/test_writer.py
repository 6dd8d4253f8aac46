"""The streaming writer against arbitrary shard layouts: what changed is right, everything else is the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from portllm.algebra import lora, sums
from portllm.algebra.edits import Edit, Plain, Replace
from portllm.checkpoint.files import copying
from portllm.checkpoint.files.copying import copy_and_hash
from portllm.checkpoint.files.hashing import identity
from portllm.checkpoint.files.headers import Header, read_header
from portllm.checkpoint.files.progress import ByteMeter
from portllm.checkpoint.files.tensors import TensorEntry
from portllm.checkpoint.writing import segments
from portllm.checkpoint.writing.targets import Target, TargetFile, laid_out, new_entry, plain_file
from portllm.checkpoint.writing.writer import (
    Job,
    Written,
    write_files,
    write_subset,
)
from portllm.errors import CheckpointError, PatchError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def add(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> Callable[[], Edit]:
    return lambda: sums.AddLora(sums.PlacedUpdate(sums.Update(a, b, scale)))


def write(header: Header, out: Path, edits: dict[str, Callable[[], Edit]], known: Any = ()) -> Written:
    """One file, its layout kept, with no progress to report."""
    return write_files([plain_file(header, out, edits)], Job(dict(known), ByteMeter(0)))[out]


def by_name(digests: dict[TensorEntry, str]) -> dict[str, str]:
    return {entry.name: digest for entry, digest in digests.items()}


def blake3_of(data: bytes) -> str:
    return str(blake3(data).hexdigest())


def digest(tensor: torch.Tensor) -> str:
    return str(blake3(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest())


@st.composite
def layouts(draw: st.DrawFn) -> list[list[tuple[torch.dtype, tuple[int, ...], bool]]]:
    """Shards of (dtype, shape, changed or not); empty tensors, scalars and odd sizes among them."""
    shape = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    plain = st.tuples(st.sampled_from([*DTYPES, torch.int64, torch.bool]), shape, st.just(False))
    matrix = st.tuples(st.sampled_from(DTYPES), st.tuples(st.integers(0, 9), st.integers(0, 9)), st.just(True))
    return draw(st.lists(st.lists(plain | matrix, min_size=1, max_size=4), min_size=1, max_size=4))


@given(layout=layouts(), piece=st.sampled_from([1, 7, 300, 1 << 20]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout(
    layout: list[list[tuple[torch.dtype, tuple[int, ...], bool]]],
    piece: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    torch.manual_seed(len(layout))
    files: list[TargetFile] = []
    headers, before, after = {}, {}, {}
    for i, shard in enumerate(layout):
        tensors = {f"{i}.{j}": torch.randn(shape).mul_(3).to(dtype) for j, (dtype, shape, _) in enumerate(shard)}
        save_file(tensors, folder / f"{i}.safetensors", metadata={"format": "pt", "shard": str(i)})
        header = read_header(folder / f"{i}.safetensors")
        edits: dict[str, Callable[[], Edit]] = {}
        for j, (_, shape, changed) in enumerate(shard):
            name = f"{i}.{j}"
            before[name] = after[name] = tensors[name]
            if changed:
                a, b = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
                edits[name] = add(a, b, 1.5)
                after[name] = lora.add_delta(tensors[name], a, b, 1.5)
        headers[folder / f"out-{i}.safetensors"] = header
        files.append(plain_file(header, folder / f"out-{i}.safetensors", edits))
    seen: list[tuple[int, int]] = []
    meter = ByteMeter(sum(file.nbytes for file in files), lambda done, total: seen.append((done, total)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segments, "SEGMENT_BYTES", piece)
        written = write_files(files, Job({}, meter))
    for target, header in headers.items():
        result = written[target]
        assert target.read_bytes()[: header.data_start] == header.path.read_bytes()[: header.data_start]
        assert result.digest == blake3_of(target.read_bytes())
        assert result.sources == {header.path: identity(header.path.stat())}
        for name, tensor in load_file(target).items():
            assert torch.equal(tensor, after[name])
            assert by_name(result.before)[name] == digest(before[name])
            assert by_name(result.after)[name] == digest(after[name])
    assert seen[-1] == (meter.total, meter.total)
    assert seen == sorted(seen)


@pytest.fixture
def one(tmp_path: Path) -> Header:
    torch.manual_seed(0)
    save_file({"w": torch.randn(40, 30), "x": torch.randn(10)}, tmp_path / "one.safetensors")
    return read_header(tmp_path / "one.safetensors")


class Centred(Plain):
    """An edit that must have seen every row before the first: minus the sum of all that it saw."""

    surveys = True

    def __init__(self) -> None:
        self.sum, self.seen = torch.zeros(1), 0

    def survey(self, old: torch.Tensor, row: int, scratch: lora.Scratch) -> None:
        assert row == self.seen
        self.seen += len(old)
        self.sum = self.sum + old.sum()

    def rows(self, old: torch.Tensor | None, row: int, out: torch.Tensor, scratch: lora.Scratch) -> float:
        assert old is not None
        assert self.seen == 40
        out.copy_(old - self.sum)
        return float(out.abs().max())

    def exact(self, old: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError


def test_an_edit_that_surveys_sees_every_old_row_first(
    one: Header, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 300)
    write(one, tmp_path / "out", {"w": Centred})
    old = load_file(one.path)["w"]
    torch.testing.assert_close(load_file(tmp_path / "out")["w"], old - old.sum())


def entry(name: str, dtype: str, *shape: int) -> TensorEntry:
    return new_entry(name, dtype, shape)


def test_tensors_of_several_files_and_of_none_in_one_file(one: Header, tmp_path: Path) -> None:
    save_file({"y": torch.randn(3, 2, 5)}, tmp_path / "two.safetensors")
    two = read_header(tmp_path / "two.safetensors")
    grown, a, b = torch.randn(50, 30), torch.randn(2, 5), torch.randn(6, 2)
    targets = [
        Target(replace(one.tensors["w"], name="copy of w"), one.tensors["w"]),
        Target(two.tensors["y"], two.tensors["y"], add(a, b)),
        Target(entry("w", "F32", 50, 30), None, lambda: Replace(lambda row, count: grown[row:][:count])),
    ]
    out = tmp_path / "out"
    result = write_files([laid_out(targets, {}, out)], Job({}, ByteMeter(0)))[out]
    found, header = load_file(out), read_header(out)
    assert torch.equal(found["copy of w"], load_file(one.path)["w"])
    y = load_file(two.path)["y"]
    assert torch.equal(found["y"], lora.add_delta(y.view(6, 5), a, b, 1.0).view(3, 2, 5))
    assert torch.equal(found["w"], grown)
    assert result.digest == blake3_of(out.read_bytes())
    assert result.after == {header.tensors[name]: digest(tensor) for name, tensor in found.items()}
    assert result.before == {one.tensors["w"]: digest(found["copy of w"]), two.tensors["y"]: digest(y)}
    assert set(result.sources) == {one.path, two.path}


def test_a_header_of_ones_own_is_the_one_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3), "a": torch.ones(2, 2), "é": torch.zeros(1, dtype=torch.bool), "": torch.tensor(7),
        "h": torch.ones(5, dtype=torch.bfloat16), "g": torch.ones(5, dtype=torch.float16), "none": torch.ones(0, 4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    theirs = read_header(tmp_path / "theirs")
    targets = [Target(e, e) for e in reversed(theirs.tensors.values())]
    write_files([laid_out(targets, theirs.metadata, tmp_path / "ours")], Job({}, ByteMeter(0)))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_known_digests_are_taken_as_they_are(one: Header, tmp_path: Path) -> None:
    known = {one.tensors["x"]: "1" * 64, one.tensors["w"]: "2" * 64}
    written = write(one, tmp_path / "out", {"w": add(torch.ones(1, 30), torch.ones(40, 1))}, known)
    assert written.before == known
    assert by_name(written.after)["x"] == "1" * 64
    assert by_name(written.after)["w"] == digest(load_file(tmp_path / "out")["w"])


def test_a_port_of_plain_lora_needs_no_torch(
    tmp_path: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]
) -> None:
    """Its import would take longer than the port, and most of the memory."""
    name = "model.layers.0.self_attn.q_proj"
    base = make_checkpoint(tmp_path / "base", {f"{name}.weight": torch.ones(4, 4, dtype=torch.bfloat16)})
    patch = make_patch(tmp_path / "patch", {name: (torch.ones(2, 4), torch.ones(4, 2))})
    code = (
        "import sys; from portllm.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "sys.exit(('torch' in sys.modules) + 2 * ('numpy' not in sys.modules))"
    )
    command = ["port", str(patch), "--onto", str(base), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert (done.returncode, "1 tensor" in done.stdout + done.stderr) == (0, True), done.stderr
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"], torch.full((4, 4), 5.0))


def clone(out: int, request: int, source: int) -> None:
    """What FICLONE does, by copying."""
    assert request == copying.FICLONE
    Path(f"/proc/self/fd/{out}").write_bytes(Path(f"/proc/self/fd/{source}").read_bytes())


def test_on_a_file_system_that_shares_blocks_only_changes_are_written(
    one: Header, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[tuple[int, int]] = []
    written = os.pwrite

    def watched(handle: int, data: Any, offset: int) -> int:
        spans.append((offset, offset + len(data)))
        return written(handle, data, offset)

    a, b = torch.randn(2, 30), torch.randn(40, 2)
    plain = write(one, tmp_path / "plain", {"w": add(a, b)})
    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr(os, "pwrite", watched)
    result = write(one, tmp_path / "out", {"w": add(a, b)})
    assert (tmp_path / "out").read_bytes() == (tmp_path / "plain").read_bytes()
    assert sorted(spans) == [(0, one.data_start), (one.tensors["w"].start, one.tensors["w"].stop)]
    assert (result.digest, result.sources, result.before) == (plain.digest, plain.sources, plain.before)
    assert by_name(result.after) == by_name(plain.after)
    moved = [Target(replace(one.tensors["x"], name="y"), one.tensors["x"])]
    # a file of another layout is no clone
    write_files([laid_out(moved, {}, tmp_path / "moved")], Job({}, ByteMeter(0)))
    assert torch.equal(load_file(tmp_path / "moved")["y"], load_file(one.path)["x"])


@pytest.fixture(params=["at open", "at write", "never", "cloned"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that refuse O_DIRECT when a file is opened, or when it is written, or not; that share blocks."""
    opened, written = os.open, os.pwrite

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT and request.param == "at open":
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more)

    def refuse_to_write(handle: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT and request.param == "at write":
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(handle, data, offset)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "pwrite", refuse_to_write)
    if request.param == "cloned":
        monkeypatch.setattr(fcntl, "ioctl", clone)


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("padding", [0, 1, 2, 3, 4096])
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 40_000])
def test_any_place_on_the_disks_pages(size: int, padding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers of odd lengths put tensors at odd places; the file is the same through the page cache or past it."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 9000)
    old = torch.randn(size, dtype=torch.float32).bfloat16()
    save_file({"a": old, "b": old.view(-1, 1).clone()}, tmp_path / "aligned.safetensors")
    text = (tmp_path / "aligned.safetensors").read_bytes()
    length = struct.unpack("<Q", text[:8])[0]
    path = tmp_path / "in.safetensors"
    path.write_bytes(struct.pack("<Q", length + padding) + text[8 : 8 + length] + b" " * padding + text[8 + length :])
    a, b = torch.randn(1, 1), torch.randn(size, 1)
    written = write(read_header(path), tmp_path / "out", {"b": add(a, b)})
    found = load_file(tmp_path / "out")
    assert torch.equal(found["a"], old)
    assert torch.equal(found["b"], lora.add_delta(old.view(-1, 1), a, b, 1.0))
    assert (tmp_path / "out").stat().st_size == path.stat().st_size
    assert written.digest == blake3_of((tmp_path / "out").read_bytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows_is_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"w": torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)}, tmp_path / "one.safetensors")
    header = read_header(tmp_path / "one.safetensors")
    big = torch.full((1, 4), torch.finfo(dtype).max, dtype=torch.float64)
    with pytest.raises(PatchError, match="w plus the patch is not finite"):
        write(header, tmp_path / "out", {"w": add(big, torch.ones(4, 1))})


def test_one_failing_shard_stops_the_others(one: Header, tmp_path: Path) -> None:
    def fail(*_: int) -> None:
        raise OSError(28, "No space left on device")

    shared = Job({}, ByteMeter(0, fail))
    with pytest.raises(OSError, match="No space left"):
        write_files([plain_file(one, tmp_path / f"out-{i}", {}) for i in range(9)], shared)
    assert shared.meter.cancelled.is_set()


def test_an_input_that_changes_under_us_is_refused(one: Header, tmp_path: Path) -> None:
    with one.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        write(one, tmp_path / "out", {})
    os.truncate(one.path, one.data_start + 3)
    with pytest.raises(CheckpointError, match="changed while it was read|became shorter while it was read"):
        write(one, tmp_path / "out", {})


def test_torchs_settings_are_as_before(one: Header, tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("medium")
    threads = torch.get_num_threads()
    try:
        write(one, tmp_path / "out", {})
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision("highest")


def test_copy_file_follows_links(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"bytes" * 300_000)
    (tmp_path / "link").symlink_to(tmp_path / "source")
    digest = copy_and_hash(tmp_path / "link", tmp_path / "copy", ByteMeter(0))
    assert digest == blake3_of((tmp_path / "source").read_bytes())
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()
    assert not (tmp_path / "copy").is_symlink()


@pytest.mark.parametrize("names", [["w"], ["x"], ["w", "x"], []])
def test_a_subset_is_a_file_of_its_own(names: list[str], one: Header, tmp_path: Path) -> None:
    meter = ByteMeter(one.size)
    digest = write_subset(one, names, tmp_path / "out", meter)
    assert digest == blake3_of((tmp_path / "out").read_bytes())
    assert meter.done == meter.total
    whole = load_file(one.path)
    found = load_file(tmp_path / "out")
    assert set(found) == set(names)
    assert all(torch.equal(found[name], whole[name]) for name in names)
