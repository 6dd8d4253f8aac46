"""OUT appears complete or not at all: written beside itself, synced, renamed.

A kill leaves at most one `.NAME.partial` beside OUT, recognised and removed by the next run that
writes the same OUT. The partial directory is locked while it is written, so that two runs never mix.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from portllm.errors import OutputError


@contextlib.contextmanager
def staged(out: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A directory beside `out` to write into; it becomes `out` when the block ends without error.

    Raises OutputError when `out` is one of `inputs` or lies in one of them, when it exists and is
    not empty (unless `force`), when another process is writing it, or when the disk refuses.
    """
    refuse(out, force=force, inputs=inputs)
    partial = out.parent / f".{out.name}.partial"
    with _refusals_of_the_disk(out), _parents(out.parent), _locked(partial, out):
        try:
            _empty(partial)
            _recover(out)
            refuse(out, force=force, inputs=inputs)  # what was recovered counts as there
            yield partial
            sync_tree(partial)
            refuse(out, force=force, inputs=inputs)
            _replace(partial, out)
            sync_directory(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """A path beside `out` to write one file to; it replaces `out` when the block ends without error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _sync_file(partial)
        partial.chmod(0o666 & ~_umask())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(out.parent)


def refuse(out: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Raise OutputError where `out` may not be written (see `staged`)."""
    target = out.resolve()
    for source in inputs:
        origin = source.resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise OutputError(f"{out}: OUT overlaps the input {source}; inputs are never changed, choose another OUT")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: expected a directory or nothing, found a file or link; choose another OUT")
    if not force and out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out}: exists and is not empty; pass --force to replace it or choose another OUT")


def sync_tree(root: Path) -> None:
    """fsync every file and directory below `root`, so that the rename cannot outrun the data."""
    for folder, _, names in os.walk(root):
        for name in names:
            _sync_file(Path(folder) / name)
        sync_directory(Path(folder))


def sync_directory(folder: Path) -> None:
    """fsync a directory, which makes a rename in it durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(handle), os.stat(partial))
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise OutputError(f"{out}: another portllm is writing it; wait for it to finish, or stop it, and try again")
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _refusals_of_the_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        text = f"{out}: could not be written ({error.strerror or error}{where})"
        raise OutputError(f"{text}; see to the disk and try again") from error


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make `folder`; on failure, remove again what was made."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # another run may have put something there
                path.rmdir()
        raise


def _recover(out: Path) -> None:
    """Undo or finish the replacement of an OUT in which an earlier run was killed (see `_replace`)."""
    aside = _aside(out)
    if aside.is_dir() and not out.exists():
        aside.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.replaced"


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    # an existing directory cannot be replaced in one step: move it aside, and back if the rename fails
    aside = _aside(out)
    out.rename(aside)
    try:
        partial.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
