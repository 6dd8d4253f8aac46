"""Copy a published release, of the hub or of a directory, into a folder of the project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.amounts import size
from portllm.checkpoint.base.copying import copy_checkpoint
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.record.provenance import public_name, revision
from portllm.checkpoint.record.records import Source
from portllm.lm.remote.hub import resolve

if TYPE_CHECKING:
    from portllm.checkpoint.files.progress import Progress
    from portllm.lm.remote.downloading import Download

SMALL_BYTES = 10_000_000  # not worth a mention: the index is downloaded before the rest is counted


@dataclass(frozen=True)
class DownloadCallbacks:
    """`on_note` receives what will be downloaded, in words; `on_bytes` (bytes present, bytes in all)."""

    on_note: Callable[[str], object] = lambda _: None
    on_bytes: Progress | None = None


def find(name: str, callbacks: DownloadCallbacks) -> Path:
    """Return the directory of a release: itself, or the hub's at one commit (see `hub.resolve`)."""

    def note(download: Download) -> None:
        callbacks.on_note(describe(download))

    return resolve(name, on_plan=note, on_progress=callbacks.on_bytes)


def copy(release: Path, folder: Path, callbacks: DownloadCallbacks) -> Source:
    """Copy the release into `folder` and return where it came from. Raises CheckpointError and OutputError."""
    copy_checkpoint(release, folder, callbacks.on_bytes)
    return Source(name=public_name(release), fingerprint=fingerprint(folder), revision=revision(release))


def describe(download: Download) -> str:
    """Return in words what will be downloaded, and the space that is free for it."""
    present = f", {size(download.present)} of it available already" if download.present > SMALL_BYTES else ""
    if download.present == download.nbytes:
        present = ", all of it available already"
    return (
        f"{download.repo} at {download.commit[:12]}: {len(download.files)} files, {size(download.nbytes)}{present}; "
        f"{size(download.free)} free on the disk of the hub's cache"
    )
