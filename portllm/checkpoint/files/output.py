"""OUT appears complete or not at all: it is written next to its final path, synced and renamed.

Next to OUT these can exist during a run or after a kill, until the next run that writes the same OUT:
    .NAME.partial    the directory being written; locked, so that two runs never mix
    .NAME.replaced   the earlier OUT, complete; renamed back where OUT is absent
    .NAME.discarded  a directory being deleted, no longer complete
    .NAME.kept       the state from which the next run of the same work continues (see `kept`)

Of several processes on one job the main one writes; the others write to a temporary directory that is deleted.
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
# the partial directories of this process, each with the folders made for it (see `abandon`)
_writing: dict[Path, Sequence[Path]] = {}


@contextlib.contextmanager
def staged(out: Path, *, force: bool = False, inputs: Sequence[Path] = (), key: str | None = None) -> Iterator[Path]:
    """Yield a directory next to `out` to write into; it becomes `out` when the block ends without error.

    With a `key`, which names the work, the block may fill `kept(out, key)`. That directory survives a kill, Ctrl-C, a
    crash, a full disk or too little memory: the next run with the same key continues from it. Success removes it, and
    so does an error that would occur again.

    Raises OutputError when `out` overlaps one of `inputs`, or exists and is not empty (unless `force`). Raises it also
    when another process is writing `out`, or when a write fails.
    """
    if not processes.is_main():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    refuse(out, force=force, inputs=inputs)
    partial = _beside(out, "partial")
    with _refusals_of_the_disk(out), _parents(out.parent) as folders, _locked(partial, out):
        _empty(partial)
        _recover(out)
        refuse(out, force=force, inputs=inputs)  # a recovered OUT exists, too
        with _noted(partial, folders), _keeping(out, key):
            yield partial
            sync_tree(partial)
            refuse(out, force=force, inputs=inputs)
            _replace(partial, out)


def kept(out: Path, key: str) -> Path:
    """Return the directory for the state from which the next run of work `key` on `out` continues; see `staged`."""
    return _beside(out, "kept") / key


@contextlib.contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """Yield a path next to `out` to write one file to; it replaces `out` when the block ends without error.

    Raises OutputError when `out` is a directory, when its path cannot exist, or when a write fails.
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
    """Raise OutputError where the file `out` cannot be written; a check before long work."""
    if not processes.is_main():
        return
    with _refusals_of_the_disk(out):
        existing = next(path for path in (out, *out.parents) if path.exists() or path == path.parent)
        if existing == out and out.is_dir():
            raise OutputError(f"{out}: expected a file or nothing, found a directory; name a file")
        if existing != out and not existing.is_dir():
            raise OutputError(f"{out}: expected {existing} to be a directory, found a file; choose another place")


def abandon() -> None:
    """Remove what this process is writing; for a process that is blocked permanently and about to be ended."""
    for partial, folders in list(_writing.items()):
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(folders)


@contextlib.contextmanager
def _noted(partial: Path, folders: Sequence[Path]) -> Iterator[None]:
    _writing[partial] = folders  # the entry stays after an error: a signal may interrupt the clean-up
    yield
    del _writing[partial]


@contextlib.contextmanager
def _keeping(out: Path, key: str | None) -> Iterator[None]:
    """Remove the kept state of other work first, and all kept state at the end, unless the next run can use it."""
    root = _beside(out, "kept")
    if key is None:
        shutil.rmtree(root, ignore_errors=True)
    for state in root.iterdir() if root.is_dir() and not root.is_symlink() else ():
        if state.name != key:
            shutil.rmtree(state, ignore_errors=True)
    try:
        yield
    except PortllmError as error:
        # a lack of memory or disk, or another process, can be gone in the next run; any other error would occur again
        if not isinstance(error, (MachineError, OutputError)):
            shutil.rmtree(root, ignore_errors=True)
        raise
    shutil.rmtree(root, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove partial files of killed runs next to the file `out`; a recent one may belong to a running process."""
    for stale in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink()


def check_room(folder: Path, needed: int, who: str) -> None:
    """Raise OutputError where `needed` bytes and their records do not fit on the disk of `folder`.

    `who` is the subject and verb of the error's text: "the ported files need".
    """
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN_BYTES:
        raise OutputError(
            f"{folder.parent}: has {free / 1e9:.2f} GB free, {who} {needed / 1e9:.2f} GB; "
            "free some space or choose another disk"
        )


def refuse(out: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Raise OutputError where `out` may not be written (see `staged`); a check before long work."""
    if not processes.is_main():  # only the main process writes `out`
        return
    try:
        _refuse(out, force=force, inputs=inputs)
    except (OSError, ValueError) as error:  # a name that is too long or contains NUL, or no permission to read
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{out}: cannot be written ({reason}); choose another OUT") from error


def _refuse(out: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    if out.name in ("", ".."):
        raise OutputError(f"{out}: expected the name of a directory to make; choose another OUT")
    target = Path(os.path.realpath(out))  # resolve() would raise RuntimeError for a circle of links
    for source in inputs:
        origin = Path(os.path.realpath(source))
        if target == origin or origin in target.parents or target in origin.parents:
            raise OutputError(f"{out}: OUT overlaps the input {source}; inputs are never changed, choose another OUT")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: expected a directory or nothing, found a file or link; choose another OUT")
    if not force and out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out}: exists and is not empty; pass --force to replace it or choose another OUT")


def sync_tree(root: Path) -> None:
    """Sync every file and directory below `root`, so that the data is on the disk before the rename."""
    for folder, _, names in os.walk(root):
        for name in names:
            _sync_file(Path(folder) / name)
        sync_directory(Path(folder))


def sync_directory(folder: Path) -> None:
    """Sync a directory, which makes a rename in it durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(handle, folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync for directories
            raise
    finally:
        os.close(handle)


def sync(handle: int, path: Path) -> None:
    """Sync an open file. Raises OSError that names fsync and the file."""
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, f"fsync failed: {error.strerror}", path.name) from error


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Make `partial` and hold its lock; at the end remove the directory at its path, if it is the same one."""
    busy = OutputError(f"{out}: another portllm is writing it; wait for it to finish, or stop it, and try again")
    partial.mkdir(exist_ok=True)
    try:
        # O_NOFOLLOW: a link could lead to another directory, which would be emptied
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
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
        if type(error).__name__ == "SafetensorError" and "os error" in str(error):  # by name: importing it takes time
            raise OutputError(f"{out}: could not be written ({error}); see to the disk and try again") from error
        if not isinstance(error, OSError):
            raise
        place = f" at {error.filename}" if error.filename else ""
        problem = f"{out}: could not be written ({error.strerror or error}{place})"
        raise OutputError(f"{problem}; see to the disk and try again") from error


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[Sequence[Path]]:
    """Make `folder` and yield the folders that were absent; remove these again on failure."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in reversed(absent):
            sync_directory(path.parent)
        yield absent
    except BaseException:
        _remove_empty(absent)
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # another run may have written into it
            path.rmdir()


def _beside(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{kind}"


def _recover(out: Path) -> None:
    """Undo or complete the replacement of OUT that an earlier, killed run began (see `_replace`)."""
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
    # an existing directory cannot be replaced in one step: rename it, and rename it back on failure
    aside, existed, written = _beside(out, "replaced"), out.exists(), partial.lstat()
    if existed:
        out.rename(aside)
    try:
        partial.rename(out)
        sync_directory(out.parent)
    except BaseException:
        if out.exists() and os.path.samestat(out.lstat(), written):
            _discard(out, out)
        if existed:
            aside.rename(out)
        raise
    if existed:
        _discard(aside, out)


def _discard(folder: Path, out: Path) -> None:
    """Rename `folder` to .NAME.discarded and delete it: no run may use an incomplete directory as the earlier OUT."""
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
