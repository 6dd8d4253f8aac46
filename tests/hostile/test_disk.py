"""A disk that is full, fails or refuses, at any moment: one line that says which, and nothing left."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

WRITES = ("write", "pwrite", "pwritev", "writev", "sendfile", "ftruncate", "truncate", "posix_fallocate")
SYNCS, READS = ("fsync", "fdatasync"), ("pread", "preadv", "readv")
MOMENTS = 12


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold cache and a warm one differ in their calls of os; here every port makes the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")


class Failing:
    """Every n-th and later call of some of os's functions fails, once `at` is set; until then they are counted."""

    def __init__(self, names: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, 1 << 62
        for name in names:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name), code))

    def _failing(self, call: Callable[..., Any], code: int) -> Callable[..., Any]:
        def failing(*args: Any, **more: Any) -> Any:
            self.count += 1
            if self.count >= self.at:
                raise OSError(code, os.strerror(code))
            return call(*args, **more)

        return failing

    def moments(self) -> list[int]:
        """Some of the calls counted so far, from the first to the last."""
        return sorted({1 + i * (self.count - 1) // (MOMENTS - 1) for i in range(MOMENTS)})


def fails(kind: str, bench: Any, refused: Callable[..., str], failing: Failing, *named: str) -> None:
    """Fail at moments spread over a port: each time one line with these words, and nothing left."""
    for moment in failing.moments():
        failing.count, failing.at = 0, moment
        line = refused(bench, honest=False)
        assert all(word in line for word in named), f"{kind} {moment}: {line}"
    assert not list(bench.folder.glob("**/.*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_write_fails(code: int, bench: Any, refused: Any, ported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(WRITES, code, monkeypatch)
    ported(bench)
    shutil.rmtree(bench.out)
    assert failing.count > 3
    fails("write", bench, refused, failing, str(bench.out), "could not be written", os.strerror(code))


@pytest.mark.parametrize("as_", ["merged", "adapter"])
def test_an_fsync_fails(as_: str, bench: Any, refused: Any, ported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.args = ["--as", as_]
    failing = Failing(SYNCS, errno.EIO, monkeypatch)
    ported(bench)
    shutil.rmtree(bench.out)
    assert failing.count > 3  # files, their directory, and the one OUT is renamed in
    fails("fsync", bench, refused, failing, str(bench.out), "fsync failed", "Input/output error")


def test_a_read_fails(bench: Any, refused: Any, ported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(READS, errno.EIO, monkeypatch)
    ported(bench)
    shutil.rmtree(bench.out)
    assert failing.count > 10
    fails("read", bench, refused, failing, str(bench.folder / "in"), "cannot be read", "Input/output")


def test_a_rename_fails(bench: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def fail(source: Any, target: Any, **more: Any) -> None:
        if str(target) == str(bench.out):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target, **more)

    monkeypatch.setattr(os, "rename", fail)
    assert "could not be written (Input/output error" in refused(bench, honest=False)


def test_a_lying_disk_is_believed_once(bench: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert "free" in refused(bench, honest=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60))
    Failing(WRITES, errno.ENOSPC, monkeypatch).at = 1
    assert "No space left on device" in refused(bench, honest=False)


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond so many bytes: a limit that the kernel keeps, whoever writes how."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_each_file_may_be_the_one_that_does_not_fit(bench: Any, refused: Any, ported: Any, limit: Any) -> None:
    (bench.base / "LICENSE").write_text("x" * 9000)
    ported(bench)
    sizes = sorted({path.stat().st_size for path in bench.out.iterdir()})
    shutil.rmtree(bench.out)
    assert len(sizes) > 5
    for size in sizes:
        limit(size - 1)
        line = refused(bench, honest=False)
        limit(resource.RLIM_INFINITY)
        assert "could not be written (File too large" in line


FULL = """
    set -e
    mount -t tmpfs -o size=64m tmpfs "$1"
    mkdir "$1/out"
    exec "$2" - "$1" "$3" "$4" <<'PROGRAM'
import os, shutil, subprocess, sys
from pathlib import Path
from portllm.errors import OutputError
from portllm.params import PortParams
from portllm.verbs import port
disk, patch, base = map(Path, sys.argv[1:])
shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60)
full = 0
for kib in range(4, 400, 8):
    subprocess.run(["mount", "-o", f"remount,size={kib}k", "tmpfs", disk], check=True)
    try:
        port.run(patch=patch, onto=base, out=disk / "out" / "ported", params=PortParams())
        break
    except OutputError as error:
        assert "could not be written (No space left on device" in str(error), error
        assert os.listdir(disk / "out") == [], os.listdir(disk / "out")
        full += 1
assert full > 3, full
assert os.listdir(disk / "out") == ["ported"]
PROGRAM
"""


def test_a_disk_that_is_truly_full(bench: Any) -> None:
    """A file system of some kilobytes, in a namespace of its own, that grows until the port fits."""
    (bench.folder / "disk").mkdir()
    try:
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", bench.folder / "disk"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    words = [str(bench.folder / "disk"), sys.executable, str(bench.patch), str(bench.base)]
    done = subprocess.run(["unshare", "-rm", "bash", "-c", FULL, "full", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RACE = """
    import os, shutil, sys
    from pathlib import Path
    import torch
    from portllm.errors import OutputError
    from portllm.params import PortParams
    from portllm.verbs import port
    out, base, patches = Path(sys.argv[1]), Path(sys.argv[2]), [Path(p) for p in sys.argv[3:5]]
    torch.set_num_threads(1)

    def race(force):
        children = []
        for patch in patches * 2:
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    port.run(patch=patch, onto=base, out=out, params=PortParams(), force=force)
                    os._exit(0)
                except OutputError as error:
                    expected = "another portllm is writing it" in str(error) or "exists and is not empty" in str(error)
                    os._exit(3 if expected else print(error, file=sys.stderr) or 1)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    for turn in range(8):
        force = turn % 2 == 1
        if not force:
            shutil.rmtree(out.parent, ignore_errors=True)
        codes = race(force)
        assert set(codes) <= {0, 3}, codes
        assert 0 in codes if force else codes.count(0) == 1, codes
        assert os.listdir(out.parent) == [out.name], os.listdir(out.parent)
        names = [name for name in sys.argv[5:7] if all(
            (out / p.name).read_bytes() == p.read_bytes() for p in Path(name).iterdir()
        )]
        assert len(names) == 1, "two ports are mixed"
"""


@pytest.mark.slow
def test_several_ports_to_one_out_do_not_mix(bench: Any, ported: Any) -> None:
    other = bench.folder / "in" / "other"
    shutil.copytree(bench.patch, other)
    wanted = []
    for patch in (bench.patch, other):
        bench.patch, bench.out = patch, bench.folder / f"alone-{patch.name}"
        bench.filled(patch / "adapter_model.safetensors", "lora_A", 1.0 + len(wanted))
        ported(bench)
        wanted.append(str(bench.out))
    out = bench.folder / "there" / "out"
    words = [str(out), str(bench.base), str(bench.folder / "in" / "patch"), str(other), *wanted]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(RACE), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
