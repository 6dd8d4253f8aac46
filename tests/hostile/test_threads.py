"""The same inputs make the same bytes: on any number of threads, any processor, any file system, in any order."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def files(folder: Path) -> dict[str, str]:
    """Every file's digest."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def large(bench: Any) -> Any:
    """A base of three shards in three dtypes, large enough for several blocks, rows that end anywhere, and threads."""
    import numpy as np

    rows, columns = 1037, 701
    for i, (dtype, shard) in enumerate(zip(("F32", "BF16", "F16"), sorted(bench.base.glob("model-*")), strict=True)):
        name = f"model.layers.{i}.large"
        values = bench.random.standard_normal((rows, columns)).astype("<f4")
        narrow = {
            "F32": lambda v: v,
            "BF16": lambda v: (v.view("<u4") >> 16).astype("<u2"),
            "F16": lambda v: v.astype(np.float16),
        }[dtype](values)
        bench.put(shard, f"{name}.weight", (dtype, (rows, columns), narrow.tobytes()))
        bench.remap(**{f"{name}.weight": shard.name})
        bench.put(bench.adapter, f"base_model.model.{name}.lora_A.weight", bench.values(2, columns))
        bench.put(bench.adapter, f"base_model.model.{name}.lora_B.weight", bench.values(rows, 2))
    bench.edit(bench.lora, target_modules=["q_proj", "v_proj", "down_proj", "large"])
    return bench


@pytest.fixture
def reference(large: Any, ported: Callable[[Any], Any]) -> dict[str, str]:
    """What one plain port of `large` writes."""
    ported(large)
    written = files(large.out)
    shutil.rmtree(large.out)
    return written


def test_any_number_of_threads(large: Any, reference: Any, ported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for threads in (1, 2, 5):
        monkeypatch.setattr(os, "cpu_count", lambda n=threads: n)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=threads: set(range(n)))
        torch.set_num_threads(threads)
        ported(large)
        assert files(large.out) == reference
        shutil.rmtree(large.out)
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
        {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "HOSTNAME": "other"},
    ],
    ids=["four threads", "an older processor"],
)
def test_another_machine(environment: dict[str, str], large: Any, reference: Any, tmp_path: Path) -> None:
    """Another process elsewhere on the disk, whose BLAS uses other instructions and threads."""
    elsewhere = tmp_path / "elsewhere" / "deep"
    shutil.copytree(large.folder / "in", elsewhere)
    words = ["port", "patch", "--onto", "base", "--out", str(tmp_path / "other-out")]
    # the names in the record are those given: the same words, from another place
    for folder in ("patch", "base"):
        words = [str(elsewhere / folder) if word == folder else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "portllm", *words], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "other-out") == reference


def test_a_file_system_that_can_do_less(
    large: Any, reference: Any, ported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without copies in the kernel, direct writes, or writes of more than some bytes at a time."""
    open_file, pwrite, preadv, readv = os.open, os.pwrite, os.preadv, os.readv

    def no(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def indirectly(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_file(path, flags, mode, **more)

    for name in ("copy_file_range", "sendfile", "posix_fadvise", "posix_fallocate"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, no)
            ported(large)
        assert files(large.out) == reference, name
        shutil.rmtree(large.out)
    monkeypatch.setattr(os, "open", indirectly)
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:70_001], at))
    monkeypatch.setattr(os, "preadv", lambda handle, data, at: preadv(handle, [data[0][:50_003]], at))
    monkeypatch.setattr(os, "readv", lambda handle, data: readv(handle, [data[0][:101]]))
    ported(large)
    assert files(large.out) == reference


def test_any_order_of_shards_and_tensors(
    large: Any, reference: Any, ported: Any, tensors_of: Callable[[Path], dict[str, Any]]
) -> None:
    wanted: dict[str, Any] = {}
    ported(large)
    for shard in large.out.glob("*.safetensors"):
        wanted |= tensors_of(shard)
    record = json.loads((large.out / "port.json").read_text())
    shutil.rmtree(large.out)
    for turn in range(2):
        _reshard(large, tensors_of, turn)
        ported(large)
        written: dict[str, Any] = {}
        for shard in large.out.glob("*.safetensors"):
            written |= tensors_of(shard)
        assert written == wanted
        again = json.loads((large.out / "port.json").read_text())
        assert again["fingerprint"] == record["fingerprint"]
        assert again["base"] == record["base"]
        shutil.rmtree(large.out)
    assert reference


def _reshard(bench: Any, tensors_of: Callable[[Path], dict[str, Any]], turn: int) -> None:
    """The same tensors in other files, in another order."""
    tensors: dict[str, Any] = {}
    for shard in bench.base.glob("*.safetensors"):
        tensors |= tensors_of(shard)
        shard.unlink()
    names = list(bench.random.permutation(sorted(tensors)))
    many = len(names) if turn == 0 else 2  # a file for each, then two
    where = {name: f"part-{i % many:05}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        bench.text(bench.base / file, b"\x02" + bytes(7) + b"{}")
        for name in (name for name in names if where[name] == file):
            bench.put(bench.base / file, name, tensors[name])
    bench.edit(bench.index, weight_map=where)
