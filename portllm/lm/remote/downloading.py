"""A repository's files brought into the hub's cache: large ones by byte ranges, taken up again where a kill left them.

huggingface_hub keeps nothing of a file that did not arrive whole. So the large files are written here, beside the place
where it looks for them (`blobs/<sha256>`), held against their SHA-256, and moved there; it then finds them and does the
rest: small files, and the snapshot of links. One writer per file: the unfinished one is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from portllm.checkpoint.files.hashing import file_digest
from portllm.checkpoint.files.output import staged_file
from portllm.checkpoint.writing.writer import Cancelled, Meter
from portllm.errors import CheckpointError, OutputError

AT_ONCE = 4
LARGEST_BYTES = 50_000_000_000  # what the hub gives by plain HTTP; its library has another way for larger files
MARGIN_BYTES = 64 << 20
WEIGHTS = ".safetensors"
SHA256 = re.compile("[0-9a-f]{64}")
PART = ".portllm.incomplete"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """A file of the repository: its size, what its content is called there, its SHA-256 where it is a large one."""

    nbytes: int
    blob: str
    sha256: str | None


@dataclass(frozen=True)
class Download:
    """Files of a repository at a commit, which `revision` stands for now, on their way into the cache."""

    repo: str
    revision: str
    commit: str
    files: Mapping[str, Wanted]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def present(self) -> int:
        """How many of these bytes are on this machine already, those of unfinished files among them."""
        return sum(_present(self._blob(file)) for file in self.files.values())

    @property
    def free(self) -> int:
        """Bytes free on the cache's disk."""
        return shutil.disk_usage(next(path for path in (self.cache, *self.cache.parents) if path.exists())).free

    @property
    def cache(self) -> Path:
        """Where huggingface_hub keeps this repository."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type="model")

    def check_room(self) -> None:
        """Raises OutputError when the cache's disk is too small."""
        missing = self.nbytes - self.present
        if missing and missing + MARGIN_BYTES > self.free:
            raise OutputError(
                f"{self.repo}: {missing / 1e9:.2f} GB are to be downloaded, the disk of the hub's cache has "
                f"{self.free / 1e9:.2f} GB free; free some space, or put the cache elsewhere (HF_HOME)"
            )

    def run(self, on_progress: Progress | None = None) -> Path:
        """The snapshot's folder, once all is there. Raises CheckpointError, OSError and the library's own errors."""
        with _hushed(bars=on_progress is None):
            meter = Meter(self.nbytes, on_progress)
            meter.add(self.present)
            weights = [name for name in self.files if name.endswith(WEIGHTS)]
            # weights come last: where they are whole, everything is
            self._bring([name for name in self.files if name not in weights], meter)
            folder = self._bring(weights, meter)
            self._note_revision()
        if on_progress is not None:
            on_progress(self.nbytes, self.nbytes)
        return folder

    def _bring(self, names: list[str], meter: Meter) -> Path:
        from huggingface_hub import snapshot_download

        self._bring_large([name for name in names if _is_large(self.files[name])], meter)
        patterns = [glob.escape(name) for name in names]
        return Path(snapshot_download(self.repo, revision=self.commit, allow_patterns=patterns))

    def _note_revision(self) -> None:
        """Keep what the branch or tag stood for, for the time without the hub, where its library looks for it."""
        if self.revision != self.commit and ".." not in self.revision:
            with staged_file(self.cache / "refs" / self.revision) as ref:
                ref.write_text(self.commit, encoding="utf-8")

    def _bring_large(self, names: list[str], meter: Meter) -> None:
        missing = [name for name in names if not self._blob(self.files[name]).exists()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = [pool.submit(self._one, name, meter) for name in missing]
            try:
                for future in futures:
                    with contextlib.suppress(Cancelled):
                        future.result()
            except BaseException:
                meter.cancelled.set()  # Ctrl-C, too, stops the files at their next piece
                raise

    def _one(self, name: str, meter: Meter) -> None:
        file = self.files[name]
        blob = self._blob(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _alone(blob) as part:
                if part is not None:
                    self._receive(name, part, file, meter)
                    os.rename(_part(blob), blob)
        except BaseException:
            meter.cancelled.set()
            raise

    def _receive(self, name: str, part: BinaryIO, file: Wanted, meter: Meter) -> None:
        """Fill the unfinished file up to its size, and hold it against its SHA-256."""
        from huggingface_hub.file_download import http_get

        have = part.seek(0, os.SEEK_END)
        if have > file.nbytes:
            meter.add(-have)
            have = part.seek(0)
            part.truncate()
        url, headers = self._address(name)
        counted = cast(BinaryIO, _Counted(part, meter))
        try:
            http_get(url, counted, resume_size=have, headers=headers, expected_size=file.nbytes)
        except OSError as error:
            if type(error) is not OSError or error.errno is not None:
                raise
            # too few bytes or too many: the library's words about it hold the end of the signed address
            raise CheckpointError(
                f"{self.repo}: {name} did not arrive whole, expected {file.nbytes} bytes, found "
                f"{part.seek(0, os.SEEK_END)}; run the same command again"
            ) from error
        part.flush()
        os.fsync(part.fileno())
        if file_digest(_part(self._blob(file))) != file.sha256:
            part.truncate(0)
            raise CheckpointError(
                f"{self.repo}: {name} did not arrive as the hub has it (another SHA-256) and was put away; "
                "run the same command again"
            )

    def _address(self, name: str) -> tuple[str, dict[str, str]]:
        """Where the bytes of a file lie, and the headers to ask with: the token goes to the hub, never to its store."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.repo, name, revision=self.commit)
        where = get_hf_file_metadata(url).location
        headers = build_hf_headers()
        if urlsplit(where)[:2] != urlsplit(url)[:2]:  # scheme, too: by http anybody could read it
            headers.pop("authorization", None)
        return where, headers

    def _blob(self, file: Wanted) -> Path:
        return self.cache / "blobs" / file.blob


class _Counted:
    """A file being received: what is written is counted, and stops when another file has failed."""

    def __init__(self, file: BinaryIO, meter: Meter) -> None:
        self._file, self._meter = file, meter
        self.tell, self.seek = file.tell, file.seek

    def write(self, piece: bytes) -> int:
        self._meter.add(len(piece))
        return self._file.write(piece)

    def truncate(self) -> int:
        """Forget what stands behind the position: the server began anew."""
        before = self._file.seek(0, os.SEEK_CUR)
        self._meter.add(before - os.fstat(self._file.fileno()).st_size)
        return self._file.truncate()


@contextlib.contextmanager
def _alone(blob: Path) -> Iterator[BinaryIO | None]:
    """The unfinished file of `blob`, locked; None where another process has finished it meanwhile."""
    while not blob.exists():
        with os.fdopen(os.open(_part(blob), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for whoever downloads the same
            if _is_at(file, _part(blob)):
                yield file
                return
    yield None


def _is_large(file: Wanted) -> bool:
    # what the server names becomes a file's name
    return SHA256.fullmatch(file.sha256 or "") is not None and file.nbytes <= LARGEST_BYTES


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False  # another process has finished it


def _part(blob: Path) -> Path:
    return blob.with_name(blob.name + PART)


def _present(blob: Path) -> int:
    for path in (blob, _part(blob)):
        with contextlib.suppress(OSError):
            return path.stat().st_size
    return 0


@contextlib.contextmanager
def _hushed(*, bars: bool) -> Iterator[None]:
    """Keep the hub's library from warning (its lines hold signed addresses) and, unless `bars`, from drawing bars."""
    from huggingface_hub import utils

    library: Any = utils  # its bars are no part of what it says it exports
    logger = logging.getLogger("huggingface_hub")
    level, drawn = logger.level, not library.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if drawn and not bars:
        library.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if drawn and not bars:
            library.enable_progress_bars()
