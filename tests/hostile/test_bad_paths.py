"""Every way the command line itself is wrong: paths that are none, an OUT that may not be written, flags unheard of."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Spoil = Callable[[Any], object]


def to(**fields: Any) -> Spoil:
    """The command line names another path."""
    return lambda b: [setattr(b, key, value(b) if callable(value) else value) for key, value in fields.items()]


def args(*words: str) -> Spoil:
    return lambda b: setattr(b, "args", list(words))


def empty(b: Any) -> Path:
    made = Path(b.folder / "empty")
    made.mkdir()
    return made


def fifo(b: Any) -> Path:
    made = Path(b.folder / "pipe")
    os.mkfifo(made)
    return made


def link(target: str) -> Callable[[Any], Path]:
    def make(b: Any) -> Path:
        made = Path(b.folder / "link")
        made.symlink_to(target)
        return made

    return make


def full(b: Any) -> Path:
    made = empty(b)
    (made / "precious").write_text("1")
    return made


def under_a_file(b: Any) -> Path:
    (b.folder / "file").write_text("1")
    return Path(b.folder / "file" / "deep" / "out")


PATHS: dict[str, tuple[Spoil, str]] = {
    "no patch there": (to(patch=Path("/nowhere/my-patch")), "/nowhere/my-patch"),
    "no base there": (to(base=Path("/nowhere/my-base")), "/nowhere/my-base"),
    "no old base there": (args("--from", "/nowhere/old"), "/nowhere/old"),
    "an empty directory as patch": (to(patch=empty), "empty"),
    "an empty directory as base": (to(base=empty), "empty"),
    "a file as patch": (to(patch=lambda b: b.lora), "adapter_config.json"),
    "a file as base": (to(base=lambda b: b.config), "config.json"),
    "a FIFO as patch": (to(patch=fifo), "pipe"),
    "a FIFO as base": (to(base=fifo), "pipe"),
    "a device as base": (to(base=Path("/dev/zero")), "/dev/zero"),
    "a link to nothing as base": (to(base=link("gone")), "link"),
    "a link in circles as base": (to(base=link("link")), "link"),
    "patch and base exchanged": (to(patch=lambda b: b.base), "adapter_config.json"),
    "a patch as old base": (lambda b: args("--from", str(b.patch))(b), "config.json"),
    "a patch of no name": (to(patch=""), "''"),
    "a base of no name": (to(base=""), "''"),
    "a base of too long a name": (to(base="x" * 5000), "xxxx"),
    "a base with a NUL in its name": (to(base="a\0b"), "a"),
    "a base with an escape in its name": (to(base="/a\n\x1b[31mb"), "/a"),
    "a base of half a character": (to(base="/a\udcffb"), "/a"),
    "a base by a wrong hub id": (to(base="a/b/c@@d"), "a/b/c@@d"),
}

OUTPUTS: dict[str, tuple[Spoil, str]] = {
    "OUT is not empty": (to(out=full), "--force"),
    "OUT is the base": (to(out=lambda b: b.base), "base"),
    "OUT is the base by another name": (to(out=lambda b: b.base / ".." / "base"), "base"),
    "OUT in the base": (to(out=lambda b: b.base / "deep" / "out"), "base"),
    "OUT is the patch": (to(out=lambda b: b.patch), "patch"),
    "OUT in the patch": (to(out=lambda b: b.patch / "out"), "patch"),
    "OUT around the inputs": (to(out=lambda b: b.folder / "in"), "in"),
    "OUT is the old base": (lambda b: (args("--from", str(b.old))(b), setattr(b, "out", b.old)), "old"),
    "OUT a link to the base": (to(out=link("in/base")), "link"),
    "OUT in a link to the base": (to(out=lambda b: link("in/base")(b) / "out"), "link"),
    "OUT a link to an empty directory": (to(out=lambda b: (empty(b), link("empty")(b))[1]), "link"),
    "OUT a link to nothing": (to(out=link("gone")), "link"),
    "OUT a link in circles": (to(out=link("link")), "link"),
    "OUT in a link in circles": (to(out=lambda b: link("link")(b) / "out"), "link"),
    "OUT a file": (to(out=lambda b: under_a_file(b).parent.parent), "file"),
    "OUT a FIFO": (to(out=fifo), "pipe"),
    "OUT a device": (to(out=Path("/dev/null")), "/dev/null"),
    "OUT under a file": (to(out=under_a_file), "file"),
    "OUT where nothing can be made": (to(out=Path("/proc/portllm/out")), "/proc/portllm"),
    "OUT of too long a name": (to(out=lambda b: b.folder / ("x" * 300)), "xxxx"),
    "OUT of a name too long to be written beside": (to(out=lambda b: b.folder / ("x" * 250)), "xxxx"),
    "OUT in a path too long": (to(out=lambda b: b.folder / "/".join(["deep"] * 2000) / "out"), "deep"),
    "OUT with an escape in its name, not empty": (
        to(out=lambda b: full(b).rename(b.folder / "a\n\x1b[31mb")),
        "a\\n\\x1b[31mb",
    ),
    "OUT the root": (to(out=Path("/")), "/"),
    "OUT the directory above": (to(out=".."), ".."),
    "scale NaN": (args("--scale", "nan"), "scale"),
    "scale infinite": (args("--scale", "inf"), "scale"),
    "scale beyond float32": (args("--scale", "1e300"), "down_proj.weight"),
    "parameters absent": (args("--params", "/nowhere/params.yaml"), "params.yaml"),
}

USAGE: dict[str, tuple[Spoil, str]] = {
    "a flag unheard of": (args("--moonshine"), "--moonshine"),
    "a method unheard of": (args("--method", "moonshine"), "moonshine"),
    "an output unheard of": (args("--as", "moonshine"), "moonshine"),
    "scale a word": (args("--scale", "much"), "much"),
    "one argument too many": (args("another"), "another"),
}

KINDS = {**PATHS, **OUTPUTS}


@pytest.fixture(autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path leads into an empty directory, and the hub is out of reach."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("kind", KINDS)
def test_bad_paths_are_refused_in_one_line(
    kind: str, bench: Any, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # one file after another: of several that fail side by side, either may be the one that is named
    monkeypatch.setattr("portllm.checkpoint.writing.writer.FILES", 1)
    spoil, named = KINDS[kind]
    spoil(bench)
    assert named in refused(bench)
    assert os.listdir() == []


@pytest.mark.parametrize("kind", USAGE)
def test_bad_flags_are_a_matter_of_usage(kind: str, bench: Any, refused: Callable[..., str]) -> None:
    spoil, named = USAGE[kind]
    spoil(bench)
    assert named in refused(bench, code=2)


@pytest.mark.parametrize("word", ["--onto", "--out", "PATCH"])
def test_nothing_is_guessed_that_is_not_said(word: str, bench: Any, looked: Any) -> None:
    given = {"PATCH": [str(bench.patch)], "--onto": ["--onto", str(bench.base)], "--out": ["--out", str(bench.out)]}
    words = [argument for name, some in given.items() if name != word for argument in some]
    before = looked(bench.folder)
    done = subprocess.run([sys.executable, "-m", "portllm", "port", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert word in done.stderr.splitlines()[-1]
    assert looked(bench.folder) == before


def test_a_directory_that_may_not_be_written(bench: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so that the refusal is played."""
    mkdir = os.mkdir

    def refuse(path: Any, mode: int = 0o777, **more: Any) -> None:
        if str(path).startswith(str(bench.folder)):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, mode, **more)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert "Permission denied" in refused(bench)


@pytest.mark.parametrize("file", ["config.json", "model-00002-of-00003.safetensors", "adapter_model.safetensors"])
def test_a_file_that_may_not_be_read(file: str, bench: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    open_path, open_raw = Path.open, os.open

    def refuse(path: Any) -> None:
        if Path(path).name == file and "in" in Path(path).parts:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", lambda p, *a, **k: (refuse(p), open_path(p, *a, **k))[1])
    monkeypatch.setattr(os, "open", lambda p, *a, **k: (refuse(p), open_raw(p, *a, **k))[1])
    line = refused(bench)
    assert file in line
    assert "Permission denied" in line


REAL = {
    "no base there": ("--onto", "nowhere/base"),
    "a FIFO as base": ("--onto", "pipe"),
    "OUT is not empty": ("--out", "in"),
}


@pytest.mark.parametrize("kind", REAL)
def test_the_real_command_says_the_same(kind: str, bench: Any, looked: Any) -> None:
    os.mkfifo(bench.folder / "pipe")
    before = looked(bench.folder)
    command = [sys.executable, "-m", "portllm", *bench.argv, *REAL[kind]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.folder, timeout=15)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"Error: {REAL[kind][1]}")
    assert looked(bench.folder) == before
