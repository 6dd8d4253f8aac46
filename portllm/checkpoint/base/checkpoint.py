"""A checkpoint directory: config.json and the headers of its safetensors, single or sharded; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.files.headers import Header, check_index, read_header, shard_names
from portllm.checkpoint.files.names import CONFIG
from portllm.checkpoint.files.reading import kind_of, read_json_object, reading
from portllm.checkpoint.files.tensors import TensorEntry
from portllm.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model directory: `shards` sorted by file name, `tensors` of all of them by name."""

    path: Path
    config: Mapping[str, Any]
    shards: tuple[Header, ...]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config and headers. Raises CheckpointError, UnsafeFileError or HeaderError; reads no tensor data."""
        with reading(path):
            if not path.is_dir():
                raise CheckpointError(f"{path}: expected a model directory, found {kind_of(path)}; check the path")
        config = read_json_object(path / CONFIG)
        if not isinstance(config.get("model_type"), str | None):
            raise CheckpointError(f"{path / CONFIG}: model_type must be text; fetch the file again")
        shards = tuple(read_header(path / name) for name in shard_names(path))
        tensors: dict[str, TensorEntry] = {}
        for shard in shards:
            for name, entry in shard.tensors.items():
                if name in tensors:
                    raise CheckpointError(f"{path}: tensor {name} is in two shards; fetch the checkpoint again")
                tensors[name] = entry
        check_index(path, tensors)
        return cls(path, config, shards, tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self.tensors))

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of a tensor. Raises CheckpointError when there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name}; see its names with portllm fingerprint -v")
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        """The size of all shards in bytes."""
        return sum(shard.size for shard in self.shards)
