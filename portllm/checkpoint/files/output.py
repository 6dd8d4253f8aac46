"""OUT appears complete or not at all: written beside itself, synced, renamed.

Beside OUT there may be, for a while or after a kill, and until the next run that writes the same OUT:
    .NAME.partial    what is being written; locked, so that two runs never mix
    .NAME.replaced   the OUT that was there before, whole; put back where OUT itself is not there
    .NAME.discarded  what is being deleted, no longer whole
    .NAME.kept       what the next run of the same work goes on from (see `kept`)

Of several processes on one job the main one writes; what the others write goes to a directory that is thrown away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from portllm import processes
from portllm.errors import MachineError, OutputError, PortllmError

STALE_SECONDS = 24 * 3600
MARGIN_BYTES = 16 << 20  # records, card, directory entries
# what this process is writing, and the folders it made for it (see `abandon`)
_writing: dict[Path, Sequence[Path]] = {}


@contextlib.contextmanager
def staged(out: Path, *, force: bool = False, inputs: Sequence[Path] = (), key: str | None = None) -> Iterator[Path]:
    """A directory beside `out` to write into; it becomes `out` when the block ends without error.

    With a `key`, which names the work, the block may fill `kept(out, key)`: that outlives a kill, Ctrl-C or crash, so
    that the next run under the same key goes on from there, as it does after a full disk or too little memory; an error
    that would come again removes it, and the end.

    Raises OutputError when `out` is one of `inputs` or lies in one of them, when it exists and is
    not empty (unless `force`), when another process is writing it, or when the disk refuses.
    """
    if not processes.is_main():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    refuse(out, force=force, inputs=inputs)
    partial = _beside(out, "partial")
    with _refusals_of_the_disk(out), _parents(out.parent) as made, _locked(partial, out):
        _empty(partial)
        _recover(out)
        refuse(out, force=force, inputs=inputs)  # what was recovered counts as there
        with _noted(partial, made), _keeping(out, key):
            yield partial
            sync_tree(partial)
            refuse(out, force=force, inputs=inputs)
            _replace(partial, out)


def kept(out: Path, key: str) -> Path:
    """Where the work named `key` on `out` may keep what its next run goes on from; make it and fill it in `staged`."""
    return _beside(out, "kept") / key


@contextlib.contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """A path beside `out` to write one file to; it replaces `out` when the block ends without error.

    Raises OutputError when `out` is a directory or cannot be where it is, or when the disk refuses.
    """
    if not processes.is_main():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / out.name
        return
    refuse_file(out)
    with _refusals_of_the_disk(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
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


def refuse_file(out: Path) -> None:
    """Raise OutputError where the file `out` cannot be written: at once, for work that takes long before."""
    if not processes.is_main():
        return
    with _refusals_of_the_disk(out):
        there = next(path for path in (out, *out.parents) if path.exists() or path == path.parent)
        if there == out and out.is_dir():
            raise OutputError(f"{out}: expected a file or nothing, found a directory; name a file")
        if there != out and not there.is_dir():
            raise OutputError(f"{out}: expected {there} to be a directory, found a file; choose another place")


def abandon() -> None:
    """Remove what this process is writing: for one that waits for others for ever, and is to be ended."""
    for partial, made in list(_writing.items()):
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)


@contextlib.contextmanager
def _noted(partial: Path, made: Sequence[Path]) -> Iterator[None]:
    _writing[partial] = made  # it stays after an error: a signal may come in the middle of the clean-up
    yield
    del _writing[partial]


@contextlib.contextmanager
def _keeping(out: Path, key: str | None) -> Iterator[None]:
    """Remove what was kept of other work now, and all of it in the end, unless the next run can go on from it."""
    place = _beside(out, "kept")
    if key is None:
        shutil.rmtree(place, ignore_errors=True)
    for other in place.iterdir() if place.is_dir() and not place.is_symlink() else ():
        if other.name != key:
            shutil.rmtree(other, ignore_errors=True)
    try:
        yield
    except PortllmError as error:
        # a lack of memory, disk or another process may be over next time, any other error would come again
        if not isinstance(error, (MachineError, OutputError)):
            shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove what runs killed long ago left beside the file `out`; a younger one may still be at work."""
    for stale in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink()


def check_room(folder: Path, needed: int, who: str) -> None:
    """Raise OutputError where `needed` bytes, and the records beside them, do not fit beside `folder`.

    `who` begins what the error says of them: "the ported files need".
    """
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN_BYTES:
        raise OutputError(
            f"{folder.parent}: has {free / 1e9:.2f} GB free, {who} {needed / 1e9:.2f} GB; "
            "free some space or choose another disk"
        )


def refuse(out: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Raise OutputError where `out` may not be written (see `staged`): at once, for work that fetches much before."""
    if not processes.is_main():  # it writes nothing there
        return
    try:
        _refuse(out, force=force, inputs=inputs)
    except (OSError, ValueError) as error:  # too long, a NUL in it, not ours to look at
        text = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{out}: cannot be written ({text}); choose another OUT") from error


def _refuse(out: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    if out.name in ("", ".."):
        raise OutputError(f"{out}: expected the name of a directory to make; choose another OUT")
    target = Path(os.path.realpath(out))  # not resolve(), which raises RuntimeError for links in circles
    for source in inputs:
        origin = Path(os.path.realpath(source))
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
        sync(handle, folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such call for directories
            raise
    finally:
        os.close(handle)


def sync(handle: int, path: Path) -> None:
    """fsync; an OSError of it says that it was the fsync, and of what."""
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, f"fsync failed: {error.strerror}", path.name) from error


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Make `partial` and hold its lock; what is at its path in the end is removed, if it is still ours."""
    busy = OutputError(f"{out}: another portllm is writing it; wait for it to finish, or stop it, and try again")
    partial.mkdir(exist_ok=True)
    try:
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # a link could lead us to empty a home
    except FileNotFoundError as error:
        raise busy from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        if not _is_at(handle, partial):
            raise busy
        try:
            yield
        finally:
            # after the rename another run may already be writing a partial directory of its own
            if _is_at(handle, partial):
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _refusals_of_the_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "SafetensorError" and "os error" in str(error):  # by name: safetensors takes a while
            raise OutputError(f"{out}: could not be written ({error}); see to the disk and try again") from error
        if not isinstance(error, OSError):
            raise
        where = f" at {error.filename}" if error.filename else ""
        text = f"{out}: could not be written ({error.strerror or error}{where})"
        raise OutputError(f"{text}; see to the disk and try again") from error


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[Sequence[Path]]:
    """Make `folder`; the folders that were not there, removed again on failure."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in reversed(made):
            sync_directory(path.parent)
        yield made
    except BaseException:
        _remove_empty(made)
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # another run may have put something there
            path.rmdir()


def _beside(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{kind}"


def _recover(out: Path) -> None:
    """Undo or finish the replacement of an OUT in which an earlier run was killed (see `_replace`)."""
    aside = _beside(out, "replaced")
    if aside.is_dir() and not aside.is_symlink():
        if out.exists():
            _discard(aside, out)
        else:
            aside.rename(out)
    shutil.rmtree(_beside(out, "discarded"), ignore_errors=True)


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _replace(partial: Path, out: Path) -> None:
    # an existing directory cannot be replaced in one step: move it aside, and back if anything fails
    aside, there, ours = _beside(out, "replaced"), out.exists(), partial.lstat()
    if there:
        out.rename(aside)
    try:
        partial.rename(out)
        sync_directory(out.parent)
    except BaseException:
        if out.exists() and os.path.samestat(out.lstat(), ours):
            _discard(out, out)
        if there:
            aside.rename(out)
        raise
    if there:
        _discard(aside, out)


def _discard(folder: Path, out: Path) -> None:
    """Delete `folder` under a name that says so: half of it must never be taken for the OUT that was there before."""
    discarded = _beside(out, "discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    folder.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        sync(handle, path)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
