"""A real release, of the hub or of a directory, brought into a folder of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checkpoint.base.copying import copy_checkpoint
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.record.provenance import public_name, revision
from portllm.checkpoint.record.records import Source
from portllm.lm.remote.hub import resolve

if TYPE_CHECKING:
    from portllm.lm.remote.downloading import Download

UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
SMALL_BYTES = 10_000_000  # not worth a word: the index is read before the rest is counted

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Watch:
    """Who hears what will be downloaded, in words, and how many bytes have come."""

    on_note: Callable[[str], object] = lambda _: None
    on_bytes: Progress | None = None


def find(name: str, watch: Watch) -> Path:
    """The directory of a release: itself, or the hub's at one commit (see `hub.resolve`)."""

    def tell(download: Download) -> None:
        watch.on_note(describe(download))

    return resolve(name, on_plan=tell, on_progress=watch.on_bytes)


def copy(found: Path, folder: Path, watch: Watch) -> Source:
    """Copy the release into `folder`; where it came from. Raises CheckpointError and OutputError."""
    copy_checkpoint(found, folder, watch.on_bytes)
    return Source(name=public_name(found), fingerprint=fingerprint(folder), revision=revision(found))


def describe(download: Download) -> str:
    """What will be downloaded, and whether there is room, for people."""
    here = download.present
    present = f", {_size(here)} of it here already" if here > SMALL_BYTES else ""
    if here == download.nbytes:
        present = ", all of it here already"
    return (
        f"{download.repo} at {download.commit[:12]}: {len(download.files)} files, {_size(download.nbytes)}{present}; "
        f"{_size(download.free)} free on the disk of the hub's cache"
    )


def _size(nbytes: int) -> str:
    unit, divisor = next(((u, d) for u, d in UNITS if nbytes >= d), UNITS[-1])
    return f"{nbytes / divisor:.2f} {unit}"
