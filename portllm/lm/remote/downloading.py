"""Files of a repository, brought into the hub's cache by huggingface_hub and checked against their SHA-256.

huggingface_hub downloads (by its own protocol where the hub offers it), resumes a broken connection, and keeps what is
complete. A download that is killed may start the large files in flight again; files that are complete stay.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.amounts import size
from portllm.checkpoint.files.hashing import file_digest
from portllm.checkpoint.files.progress import Progress
from portllm.errors import CheckpointError, OutputError

MARGIN_BYTES = 64 << 20
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: its size in bytes, and its SHA-256 where it is a large one."""

    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class Download:
    """Files of a repository at `commit`, which the user's `revision` (None: the default branch) stands for.

    `missing` names those that are not in the cache.
    """

    repo: str
    revision: str | None
    commit: str
    files: Mapping[str, RemoteFile]
    missing: frozenset[str]

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return self._size(self.files)

    @property
    def present(self) -> int:
        """The size of the files that are in the cache already."""
        return self.nbytes - self._size(self.missing)

    @property
    def free(self) -> int:
        """The bytes free on the cache's disk."""
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        return shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free

    def check_room(self) -> None:
        """Raise OutputError when the cache's disk is too small."""
        needed = self.nbytes - self.present
        if needed and needed + MARGIN_BYTES > self.free:
            raise OutputError(
                f"{self.repo}: {size(needed)} are to be downloaded, the disk of the hub's cache has "
                f"{size(self.free)} free; free some space, or put the cache elsewhere (HF_HOME)"
            )

    def run(self, on_progress: Progress | None = None) -> Path:
        """Download what is missing, check it, and return the snapshot's directory.

        `on_progress` receives (bytes present, bytes in all); without it huggingface_hub draws its own bars. A run that
        is killed before the check leaves its files with the library's own check, of their size. Raises CheckpointError
        for a file that is not what the hub names, OSError and the library's own errors.
        """
        if on_progress is not None:
            on_progress(self.present, self.nbytes)
        weights = [name for name in self.files if name.endswith(WEIGHTS)]
        others = [name for name in self.files if name not in weights]
        with quiet():
            # weights last: a snapshot that has its weights is complete
            self._bring(others, self.present, on_progress)
            folder = self._bring(weights, self.present + self._size(self.missing.intersection(others)), on_progress)
            for name in self.missing:
                self._check(folder / name, self.files[name])
            self._record_revision()
        if on_progress is not None:
            on_progress(self.nbytes, self.nbytes)
        return folder

    def _bring(self, names: Sequence[str], present: int, on_progress: Progress | None) -> Path:
        from huggingface_hub import snapshot_download

        bars = None if on_progress is None else _counter(present, self.nbytes, on_progress)
        folder = snapshot_download(self.repo, revision=self.commit, allow_patterns=exactly(names), tqdm_class=bars)
        return Path(folder)

    def _size(self, names: Iterable[str]) -> int:
        return sum(self.files[name].nbytes for name in names)

    def _check(self, path: Path, file: RemoteFile) -> None:
        """Remove a file from the cache, and raise CheckpointError, when it is not what the hub names."""
        if path.stat().st_size == file.nbytes and file.sha256 in (None, file_digest(path, "sha256")):
            return
        for entry in {path, path.resolve()}:  # the snapshot's link and the content
            entry.unlink()
        raise CheckpointError(
            f"{self.repo}: {path.name} did not arrive as the hub has it (another SHA-256 or size) and was removed; "
            "run the same command again"
        )

    def _record_revision(self) -> None:
        """Have the cache record what the branch or tag stands for, for use without the hub."""
        from huggingface_hub import snapshot_download

        if self.revision != self.commit and ".." not in (self.revision or ""):
            snapshot_download(self.repo, revision=self.revision, allow_patterns=[], tqdm_class=no_bars())


def exactly(names: Iterable[str]) -> list[str]:
    """Return patterns that match these names and no others."""
    return [glob.escape(name) for name in names]


def no_bars() -> type[Any]:
    """Return a class of bars for huggingface_hub that draws nothing."""
    return _counter(0, 0, lambda _present, _total: None)


def _counter(present: int, total: int, on_progress: Progress) -> type[Any]:
    """Return a class of bars for one call of huggingface_hub that draws nothing and reports the bytes received."""
    from tqdm.auto import tqdm

    counts: dict[int, int] = {}

    class Counter(tqdm):  # type: ignore[type-arg]
        """One of the call's bars. Two may count the same bytes, as received and as written: the larger count counts."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface_hub's group of bars
            self._is_of_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._is_of_bytes and n:
                counts[id(self)] = counts.get(id(self), 0) + int(n)
                on_progress(min(total, present + max(counts.values())), total)
            return None

    return Counter


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the hub's library from warnings, whose lines contain signed addresses."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
