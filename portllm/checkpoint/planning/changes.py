"""What a port will write: which tensor of the checkpoint changes, how, and by which tensors of the patch.

Decided from headers alone, whole, before anything is written; every tensor of the patch is used exactly once, or the
plan fails. The law: the planned checkpoint computes what PEFT's unmerged adapter computes on the same base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.base.checkpoint import Checkpoint, equal_values
from portllm.checkpoint.base.layout import Layout
from portllm.checkpoint.files.headers import BITS, Header, TensorEntry, times
from portllm.checkpoint.planning.replacements import first_rows, grew
from portllm.checkpoint.writing.placing import laid_out, plain_file
from portllm.checkpoint.writing.targets import Target, TargetFile
from portllm.errors import CheckpointError, ShapeError, UnsupportedPatchError

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit
    from portllm.checkpoint.adapter.patch import Patch

DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Change:
    """One tensor of the written checkpoint that is not the base's own.

    `origin` is the base's tensor read alongside, of the same shape; None where the patch alone makes the tensor. Where
    there is no `edit`, the origin's values are taken under the new name. `what` and `sources` (the patch's tensors) are
    for people.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: str | None
    edit: Callable[[], Edit] | None
    what: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Every change by tensor name; how many of the base's modules that is; and what config.json must say afterwards.

    `extended` names the modules that only grew: their new rows are in the patch's copy of a base weight.
    """

    changes: Mapping[str, Change]
    matched: int
    total: int
    config: Mapping[str, Any] = field(default_factory=dict)
    extended: tuple[str, ...] = ()

    def tensors(self, base: Checkpoint) -> dict[str, int]:
        """How many tensors of the written checkpoint are changed and how many copied."""
        names = set(base.where) | set(self.changes)
        return {"changed": len(self.changes), "copied": len(names) - len(self.changes)}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for people per change: tensor, dtype, shape, what happens, from which tensors of the patch."""
        for name, change in sorted(self.changes.items()):
            shape = [change.dtype, "×".join(map(str, change.shape))]
            yield {"tensor": name, "dtype": shape[0], "shape": shape[1], "change": change.what, "from": change.sources}

    def reshapes(self, base: Checkpoint) -> bool:
        """Whether a tensor is added or changes its size, so that headers and the index must be written anew."""
        return any(n not in base.where or c.shape != base.shape(n) for n, c in self.changes.items())

    def files(self, base: Checkpoint, folder: Path) -> list[TargetFile]:
        """The files to write into `folder`: the base's own, laid out anew only where a tensor was added or grew."""
        added: dict[Path, list[Change]] = {}
        for name, change in self.changes.items():
            if name not in base.where:
                home = base.shards[-1] if change.origin is None else base.where[change.origin]
                added.setdefault(home.path, []).append(change)
        return [self._file(base, shard, folder / shard.path.name, added.get(shard.path, [])) for shard in base.shards]

    def _file(self, base: Checkpoint, shard: Header, path: Path, added: list[Change]) -> TargetFile:
        own = {name: self.changes[name] for name in shard.tensors if name in self.changes}
        moved = any(c.shape != shard.tensors[n].shape or c.origin != n for n, c in own.items())
        if not added and not moved:
            return plain_file(shard, path, {name: change.edit for name, change in own.items() if change.edit})
        kept = [Target(entry, (shard, entry)) for name, entry in shard.tensors.items() if name not in own]
        new = [_target(change, base) for change in (*own.values(), *added)]
        return laid_out([*kept, *new], shard.metadata, path)


def _target(change: Change, base: Checkpoint) -> Target:
    origin = (base.where[change.origin], base.entry(change.origin)) if change.origin is not None else None
    length = math.prod(change.shape) * BITS[change.dtype] // 8
    return Target(TensorEntry(change.name, change.dtype, change.shape, 0, length), origin, change.edit)


def linears(layout: Layout) -> set[str]:
    """Names of the base's linear modules (transformers' Conv1D included)."""
    return {name for name, module in layout.modules.items() if module.kind in ("linear", "conv1d")}


def refuse_quantised(base: Checkpoint) -> None:
    """Raise CheckpointError for a base whose weights are quantised."""
    quantisation = base.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise CheckpointError(
            f"{base.path}: is quantised (quantization_config, method {method}), expected float32, bfloat16 or float16 "
            "weights; port onto the unquantised release and quantise the result"
        )


def check_saved(patch: Patch, layout: Layout, base: Checkpoint, old: Checkpoint | None) -> None:
    """Prove that the base weights saved with the patch are copies: of `base`'s, or of `old`'s, the one it was made on.

    PEFT overwrites the base with them on loading; a port must not. Raises ShapeError, UnsupportedPatchError.
    """
    for parameter, entry in patch.saved.items():
        name = disk_tensor(f"{parameter}.weight", layout)
        if name is None or (entry.shape != base.shape(name) and not grew(entry, base.shape(name))):
            found = "no such weight" if name is None else times(base.shape(name))
            raise ShapeError(
                f"{parameter}: the patch carries a base weight of {times(entry.shape)}, {base.path} has {found}; "
                "is this a release of the base it was trained on?"
            )
        origins = [c for c in (base, old) if c is not None and name in c.where]
        if not any(_copied(patch.header.path, entry, c, name) for c in origins):
            hint = "is this the base it was trained on?" if old is not None else "pass that base as --from to prove it"
            raise UnsupportedPatchError(
                f"{patch.header.path}: {entry.name} is a base weight saved with the patch (save_embedding_layers); "
                f"expected a copy of the old base's, found another; {hint}"
            )


def _copied(path: Path, entry: TensorEntry, base: Checkpoint, name: str) -> bool:
    """Whether a saved weight, or its first rows where a vocabulary grew, is a base's."""
    shape = base.shape(name)
    if grew(entry, shape):
        entry = first_rows(entry, shape[0])
    return equal_values((path, entry), (base.where[name].path, base.entry(name)))


def disk_tensor(parameter: str, layout: Layout) -> str | None:
    """The tensor on disk that is this parameter whole, or the one it is tied to; None where there is no single one."""
    parts = layout.parts.get(layout.tied.get(parameter, parameter), ())
    if len(parts) == 1 and not parts[0].transposed and all(isinstance(axis, tuple) for axis in parts[0].at):
        return parts[0].tensor
    return None
