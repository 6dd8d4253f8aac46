"""A ported directory against its own port.json: every file with its digest, no other weights, the same fingerprint.

No value of port.json is trusted before it is checked: the file may be edited, or come from another author.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.files import hashing, links
from portllm.checkpoint.files.headers import Header, read_headers
from portllm.checkpoint.files.names import TOKENIZER, WEIGHT_SUFFIXES
from portllm.checkpoint.files.progress import ByteMeter
from portllm.checkpoint.files.reading import kind_of
from portllm.checkpoint.record.records import PortRecord
from portllm.errors import CheckpointError, UnsafeFileError, VerificationError

HEX = re.compile(r"[0-9a-f]{64}")
PIECE_BYTES = 1 << 20
OUTPUTS = ("merged", "adapter")
# other files that determine how the directory loads: an added one can change the model as a changed weight does
LOADED = TOKENIZER | {
    "config.json", "adapter_config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A ported directory: its record, and the path of each file that the record names."""

    folder: Path
    record: PortRecord
    files: Mapping[str, Path]

    @classmethod
    def open(cls, folder: Path) -> Manifest:
        """Read port.json and resolve each file in it. Raises CheckpointError, UnsafeFileError, VerificationError."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: expected a ported directory, found {kind_of(folder)}; check the path")
        record = PortRecord.read(folder)
        if problem := _malformed(record):
            raise CheckpointError(f"{folder / PortRecord.FILE}: {problem}; make the directory again")
        return cls(folder, record, {name: _inside(folder, name) for name in sorted(record.files)})

    @property
    def nbytes(self) -> int:
        """The total size in bytes of all files that port.json names."""
        return sum(path.stat().st_size for path in self.files.values())

    def headers(self) -> list[Header]:
        """Return the safetensors headers, checked against their files and the index. Raises CheckpointError."""
        if self.record.output == "merged":
            return list(Checkpoint.open(self.folder).shards)
        return read_headers(self.folder)

    def check_names(self) -> None:
        """Raise VerificationError for a file that a loader would read and that is not in port.json."""
        for name in _present(self.folder):
            if name not in self.files and name != PortRecord.FILE and _is_loaded(name):
                raise VerificationError(
                    f"{self.folder / name}: is not in {PortRecord.FILE}, expected only files the port wrote; "
                    "remove it, or port again"
                )

    def check_digests(self, meter: ByteMeter) -> None:
        """Read every file. Raises VerificationError for the first digest that differs from port.json."""
        algorithm = self.record.algorithm
        for name, path in self.files.items():
            actual, expected = _digest(path, algorithm, meter), self.record.files[name]
            if actual != expected:
                raise VerificationError(
                    f"{self.folder / name}: has {self.record.algorithm_name} {actual[:12]}, {PortRecord.FILE} has "
                    f"{expected[:12]}; it was changed or damaged after the port, port again"
                )

    def check_fingerprint(self, meter: ByteMeter) -> None:
        """Read every tensor, without cache. Raises VerificationError when the fingerprint differs from port.json."""
        tensors = {}
        for header in self.headers():
            tensors.update(hashing.digests([header], fresh=True))
            meter.add(header.size)
        actual, expected = hashing.combine(tensors), self.record.fingerprint
        if actual != expected:
            raise VerificationError(
                f"{self.folder}: has fingerprint {actual[:12]}, {PortRecord.FILE} has {(expected or 'none')[:12]}; "
                "port again"
            )


def _malformed(record: PortRecord) -> str | None:
    """Return the first rule that a record with fields of the right types breaks, for people; None without one."""
    sources = (record.base, record.patch, *([record.trained_on] if record.trained_on is not None else []))
    checks = {
        f"output must be one of {', '.join(OUTPUTS)}": record.output in OUTPUTS,
        "scale must be finite": math.isfinite(record.scale),
        "files must name at least one file": bool(record.files),
        "files and configs must map names to digests of 64 hex digits": all(
            HEX.fullmatch(digest) for digest in (*record.files.values(), *record.configs.values())
        ),
        "every fingerprint must be 64 hex digits": all(
            HEX.fullmatch(value) for value in (record.fingerprint or "", *(s.fingerprint or "0" * 64 for s in sources))
        ),
    }
    return next((rule for rule, is_met in checks.items() if not is_met), None)


def _inside(folder: Path, name: str) -> Path:
    """Return the file `name` below `folder`. Raises UnsafeFileError where the name or a link leads out of it."""
    parts = PurePosixPath(name).parts
    is_plain = "\0" not in name and "\\" not in name and parts and "/".join(parts) == name
    if not is_plain or name.startswith("/") or ".." in parts or name == PortRecord.FILE:
        raise UnsafeFileError(
            f"{folder / PortRecord.FILE}: names the file {name[:200]!r}, expected a plain name in the directory; "
            "do not trust it, port again"
        )
    path = folder.joinpath(*parts)
    try:
        real = links.resolve(path, folder)
    except (OSError, RuntimeError) as error:
        raise VerificationError(
            f"{path}: is in {PortRecord.FILE} and not in the directory, expected every file the port wrote; port again"
        ) from error
    if not real.is_file():
        raise VerificationError(
            f"{path}: expected the file that {PortRecord.FILE} names, found another kind; port again"
        )
    return path


def _present(folder: Path) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield (Path(where) / name).relative_to(folder).as_posix()


def _is_loaded(name: str) -> bool:
    return Path(name).suffix in WEIGHT_SUFFIXES | {".py"} or name.endswith(".index.json") or name in LOADED


def _digest(path: Path, algorithm: hashing.Algorithm, meter: ByteMeter) -> str:
    total, buffer = hashing.file_hash(algorithm), memoryview(bytearray(PIECE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total.update(buffer[:count])
                meter.add(count)
    except OSError as error:
        raise VerificationError(
            f"{path}: cannot be read ({error.strerror or error}); see to its permissions or the disk and try again"
        ) from error
    return total.hexdigest()
