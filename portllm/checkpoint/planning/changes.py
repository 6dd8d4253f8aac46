"""The changes that a port makes: which tensor of the checkpoint changes, how, and by which tensors of the patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.tensors import times
from portllm.errors import CheckpointError, UnsupportedPatchError

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit

DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Change:
    """One tensor of the written checkpoint that is not the base's own.

    `origin` names the base's tensor that is read with it, of the same shape; None where the patch alone makes the
    tensor. Without an `edit`, the origin's values are taken under the new name. `what` and `sources` (the patch's
    tensors) are for people.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: str | None
    edit: Callable[[], Edit] | None
    what: str
    sources: tuple[str, ...] = ()


@dataclass
class ChangeSet:
    """The changes to one base while a plan is made.

    `modules` are the base's modules that the patch matches, `config` the keys that config.json gets, `extended` the
    modules that only grew: their new rows are in the patch's copy of a base weight.
    """

    base: Base
    changes: dict[str, Change] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    extended: list[str] = field(default_factory=list)

    def add(
        self, tensor: str, edit: Callable[[], Edit], what: str, sources: tuple[str, ...],
        *, shape: tuple[int, ...] | None = None, reads: bool = True,
    ) -> None:  # fmt: skip
        """Add a change of a base tensor, or of the one a tied head gets; `reads`: its old values are needed.

        Raises CheckpointError for a dtype that is not computed with, UnsupportedPatchError for a second change.
        """
        entry = self.base.origin(tensor)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.base.path}: {entry.name} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}; "
                "port onto the release in floating point"
            )
        if tensor in self.changes:
            raise UnsupportedPatchError(
                f"{tensor}: is changed by {self.changes[tensor].sources[0]} and by {sources[0]}; expected one change"
            )
        self.changes[tensor] = Change(
            tensor, entry.dtype, shape or entry.shape, entry.name if reads else None, edit, what, sources
        )

    def plan(self) -> Plan:
        """Return the complete plan."""
        total = self.base.linears | self.modules
        changes = dict(sorted(self.changes.items()))
        return Plan(changes, len(self.modules), len(total), self.config, tuple(self.extended))


@dataclass(frozen=True)
class Plan:
    """Every change by tensor name; how many of the base's modules match the patch; what config.json gets.

    `extended` names the modules that only grew (see ChangeSet).
    """

    changes: Mapping[str, Change]
    matched: int
    total: int
    config: Mapping[str, Any] = field(default_factory=dict)
    extended: tuple[str, ...] = ()

    def tensors(self, base: Base) -> dict[str, int]:
        """Return how many tensors of the written checkpoint are changed and how many copied."""
        names = set(base.tensors) | set(self.changes)
        return {"changed": len(self.changes), "copied": len(names) - len(self.changes)}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row for people per change: tensor, dtype, shape, what happens, from which tensors of the patch."""
        for name, change in sorted(self.changes.items()):
            shape = times(change.shape) if change.shape else ""
            yield {
                "tensor": name, "dtype": change.dtype, "shape": shape, "change": change.what, "from": change.sources,
            }  # fmt: skip

    def reshapes(self, base: Base) -> bool:
        """Return whether a tensor is added or changes its size, so that headers and the index must be rewritten."""
        return any(n not in base.tensors or c.shape != base.tensors[n].shape for n, c in self.changes.items())
