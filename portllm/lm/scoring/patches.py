"""What is scored next to the bare model: adapters and merged checkpoints, each with a unique name, checked first.

Everything here reads records, headers and tensors on disk; no model is loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from portllm.checkpoint.adapter.classification import expect_names_of_a_file
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.files.headers import read_header, read_headers
from portllm.checkpoint.files.names import ADAPTER_CONFIG, CONFIG
from portllm.checkpoint.files.names import ADAPTER_WEIGHTS as WEIGHTS
from portllm.checkpoint.files.tensors import ARRAY_DTYPES
from portllm.checkpoint.planning.planner import make_plan
from portllm.checkpoint.record.provenance import public_name, revision
from portllm.checkpoint.record.records import PatchRecord, PortRecord
from portllm.errors import EvaluationError, PatchError, PortllmError, ShapeError, UnmatchedModulesError
from portllm.lm.names.layout import open_base

OLD = "old"  # the arm of an earlier release's models
OnNote = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class EvaluatedPatch:
    """An adapter to put on the model, or a merged checkpoint to load instead of it.

    `name` is unique in an evaluation. `task` is what the patch was trained on, None where no record says so.
    """

    path: Path
    name: str
    fingerprint: str
    arm: str
    task: str | None
    merged: bool


def find_patches(
    patches: Sequence[Path], before: Sequence[Path], *, base: str, on_note: OnNote
) -> tuple[EvaluatedPatch, ...]:
    """Return what `patches` and `before` name, directories of patches included, each path once.

    `base` is the fingerprint of the model they are put on; those of `before` get the arm `old`. A path given twice is
    noted. Raises PatchError for a directory that is none of it.
    """
    arms: dict[Path, tuple[Path, bool]] = {}
    for path in _expand(patches):
        if arms.setdefault(path.resolve(), (path, False))[0] is not path:
            on_note(f"{path}: is given twice, scored once")
    for path in _expand(before):
        arms.setdefault(path.resolve(), (path, True))
    names = unique_names([path for path, _ in arms.values()])
    opened = (_open(path, names[path], base) for path, _ in arms.values())
    return tuple(
        replace(one, arm=OLD) if is_old else one for one, (_, is_old) in zip(opened, arms.values(), strict=True)
    )


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the public name of each path; where several have the same, as much of each path as tells them apart.

    Two revisions of one repository of the hub are NAME@REVISION.
    """
    candidates = {path: list(_names(path)) for path in paths}
    names = {path: found.pop(0) for path, found in candidates.items()}
    while alike := [name for name, count in Counter(names.values()).items() if count > 1]:
        names |= {path: candidates[path].pop(0) for path, name in names.items() if name in alike and candidates[path]}
    return names


def _names(path: Path) -> Iterator[str]:
    """Yield names for a path, each longer than the one before; the last is no other path's."""
    yield public_name(path)
    if found := revision(path):
        yield f"{public_name(path)}@{found}"
    parts = path.resolve().parts
    yield from (public_name(Path(*parts[-count:])) for count in range(2, len(parts)))
    yield os.fsencode(path.resolve()).decode("utf-8", "replace")


def _expand(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if _is_adapter(path) or _is_checkpoint(path):
            yield path
            continue
        inside = sorted(p for p in path.iterdir() if _is_adapter(p) or _is_checkpoint(p)) if path.is_dir() else []
        if not inside:
            raise PatchError(
                f"{path}: expected a patch (adapter_config.json), a ported checkpoint (config.json) "
                "or a directory of them, found neither; check the path"
            )
        yield from inside


def _open(path: Path, name: str, base: str) -> EvaluatedPatch:
    arm, task = _recorded(path, base)
    merged = not _is_adapter(path)
    if (path / WEIGHTS).is_file():  # PEFT ignores such tensors: the base would be scored as the patch
        expect_names_of_a_file(read_header(path / WEIGHTS))
    return EvaluatedPatch(path=path, name=name, fingerprint=fingerprint(path), arm=arm, task=task, merged=merged)


def _recorded(path: Path, base: str) -> tuple[str, str | None]:
    """Return the arm and task that a directory's own record gives; what no record says is not guessed."""
    if (path / PortRecord.FILE).is_file():
        return "ported", PortRecord.read(path).task
    if not _is_adapter(path):
        return "model", None
    if not (path / PatchRecord.FILE).is_file():
        return "patched", None
    record = PatchRecord.read(path)
    return "tuned" if record.base.fingerprint == base else "ported", record.task


def _is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file()


def _is_checkpoint(path: Path) -> bool:
    return (path / CONFIG).is_file()


# --- what is refused before a model is loaded ---


def check(folders: Iterable[Path], patches: Iterable[EvaluatedPatch], *, model: Path) -> None:
    """Refuse adapters in `patches` that do not fit `model`, then tensors in `folders` that are not finite.

    Raises ShapeError, UnmatchedModulesError, PatchError, EvaluationError.
    """
    adapters = [patch.path for patch in patches if not patch.merged]
    if adapters:
        expect_fitting(adapters, model)
    for folder in folders:
        expect_finite(folder)


def expect_fitting(adapters: Iterable[Path], model: Path) -> None:
    """Refuse, from headers alone, adapters with tensors of other shapes or for other modules than the model's.

    What portllm does not port but PEFT may load passes. Raises ShapeError, UnmatchedModulesError.
    """
    try:
        base = open_base(model)
    except PortllmError:
        return  # a model that only loading can judge
    for path in adapters:
        try:
            make_plan(Patch.open(path), base)
        except (ShapeError, UnmatchedModulesError) as error:
            raise type(error)(f"{path}: does not fit {model}: {error}") from error
        except PortllmError:
            continue  # a feature that is not ported, a quantised base: loading decides


def expect_finite(folder: Path) -> None:
    """Refuse a patch (PatchError) or checkpoint (EvaluationError) that holds NaN or infinity; read in blocks."""
    entries = [entry for header in read_headers(folder) for entry in header.tensors.values()]
    floats = [entry for entry in entries if entry.dtype in ARRAY_DTYPES]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        finite = list(pool.map(lambda entry: entry.is_finite(), floats))
    for entry, is_finite in zip(floats, finite, strict=True):
        if not is_finite:
            kind, what = (
                (PatchError, "train the patch") if _is_adapter(folder) else (EvaluationError, "make or fetch it")
            )
            raise kind(f"{entry.path}: tensor {entry.name} holds NaN or infinity; expected finite values, {what} again")


def note_idle(patches: Iterable[EvaluatedPatch], *, base: str, on_note: OnNote) -> None:
    """Note every patch that leaves the model, whose fingerprint is `base`, as it is."""
    for patch in patches:
        if patch.fingerprint == base or (not patch.merged and changes_nothing(patch.path)):
            on_note(f"{patch.name}: changes nothing of the model; its scores are the bare model's")


def changes_nothing(path: Path) -> bool:
    """Return whether an adapter is plain LoRA whose every B or A is zero."""
    try:
        patch = Patch.open(path)
    except PortllmError:
        return False
    if patch.beyond is not None:
        return False
    factors = [(pair.b_entry, pair.a_entry) for pair in patch.modules.values()]
    return all(any(not entry.array().any() for entry in pair) for pair in factors)
