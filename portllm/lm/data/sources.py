"""The source of a dataset's rows: the user's files, or the hub at one commit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import DataError
from portllm.lm.data import tables
from portllm.lm.quiet import quieten
from portllm.lm.remote import refusals

if TYPE_CHECKING:
    from pyarrow import Table

LOCAL = "local"
COMMIT = re.compile(r"[0-9a-f]{40}")
FILES = "give the data as files with --data DIR"
# the split of a single file's rows
WHOLE = "train"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The splits of a dataset as they are in their source, and the source as a record states it."""

    splits: Mapping[str, Table]
    source: str
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    decisions: Mapping[str, int] = field(default_factory=dict)


def here(data: Path, name: str) -> bool:
    """Return whether DATA has a folder or a file of that name. Raises DataError where it cannot be read."""
    try:
        return (data / name).is_dir() or any(_beside(data, name))
    except OSError as error:
        raise _unseen(data / name, error) from error


def names(data: Path) -> set[str]:
    """Return the names under which DATA holds data: its folders, and its files without their endings."""
    try:
        paths = list(data.iterdir())
    except OSError:
        return set()
    return {
        path.name if path.is_dir() else path.stem for path in paths if path.is_dir() or path.suffix in tables.ENDINGS
    }


def local(data: Path, name: str, splits: Sequence[str] | None = None) -> Loaded:
    """Read the files DATA/<name>/<split>.<ending> of the named splits (None: all), or DATA/<name>.<ending> as train.

    Raises DataError when a split has several files, or none of the files can be read.
    """
    found = _files(data, name)
    wanted = {split: paths for split, paths in found.items() if splits is None or split in splits}
    for split, paths in wanted.items():
        if len(paths) > 1:
            raise DataError(f"{data / name}: split {split} has several files ({_names(paths)}); keep one")
    reads = {split: (paths[0], tables.read(paths[0])) for split, paths in wanted.items()}
    unused = sum(len(paths) for split, paths in found.items() if split not in wanted)
    marks = sum(read.marks for _, read in reads.values())
    return Loaded(
        splits={split: read.table for split, (_, read) in reads.items()},
        source=LOCAL,
        files={_recorded_name(path, data): read.digest for path, read in reads.values()},
        decisions={k: v for k, v in (("files_not_used", unused), ("byte_order_marks", marks)) if v},
    )


def hub(
    repo: str,
    config: str | None,
    splits: Sequence[str],
    revision: str | None,
    *,
    choose: Callable[[int], Sequence[int]] | None = None,
    **settings: Any,
) -> Loaded:
    """Read splits of a dataset of the hub at one commit: `revision`, or the commit that it currently stands for.

    `choose` maps the number of rows to the rows to keep; the others are counted and not loaded. Raises DataError.
    """
    import datasets

    quieten()
    commit = resolve(repo, revision)
    found, beyond = {}, 0
    for split in splits:
        with _reasons(f"{repo}@{commit[:8]}: split {split}"):
            rows = datasets.load_dataset(repo, config, split=split, revision=commit, **settings)
        _check_commit(rows, repo, commit)
        with _reasons(f"{repo}@{commit[:8]}: split {split}"):
            kept = rows if choose is None else rows.select(choose(len(rows)))
            found[split] = kept.with_format("arrow")[:]
            beyond += len(rows) - len(kept)
    return Loaded(splits=found, source=repo, revision=commit, decisions={"beyond_limit": beyond} if beyond else {})


def _check_commit(rows: Any, repo: str, commit: str) -> None:
    """Raise DataError for another commit: where the hub fails, `datasets` loads its latest local copy of any."""
    if others := {Path(file["filename"]).parent.name for file in rows.cache_files} - {commit}:
        raise DataError(
            f"{repo}: expected commit {commit[:12]} from the hub, found only a local copy of "
            f"{min(others)[:12]}; check the network and your access to it, or {FILES}"
        )


def resolve(repo: str, revision: str | None) -> str:
    """Return the commit of `revision` (None: the default branch) of a dataset of the hub. Raises DataError."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    with _reasons(repo if revision is None else f"{repo}@{revision}"):
        sha = refusals.api().dataset_info(repo, revision=revision).sha
    if not sha:
        raise DataError(f"{repo}: the hub has no commit for {revision or 'its default branch'}; pin a revision")
    return str(sha)


@contextlib.contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Convert every error of the hub's libraries into one DataError with the cause and the next step."""
    try:
        yield
    except Exception as error:
        raise DataError(refusals.scrubbed(f"{what}: {_reason(error)}")) from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    causes = list(refusals.chain(error))
    reasons = {
        errors.GatedRepoError: "gated; accept its terms on the hub, then log in with `hf auth login`",
        errors.RevisionNotFoundError: "the dataset has no such revision; see its branches on the hub",
        errors.RepositoryNotFoundError: f"no such dataset of the hub, or no access to it; log in, or {FILES}",
        errors.OfflineModeIsEnabled: f"the hub is out of reach (HF_HUB_OFFLINE); unset that, or {FILES}",
    }
    for kind, text in reasons.items():
        if any(isinstance(cause, kind) for cause in causes):
            return text
    if any("gated dataset" in str(cause) for cause in causes):  # the only sign that `datasets` gives
        return reasons[errors.GatedRepoError]
    text = refusals.line(str(error)) or type(error).__name__
    if refusals.of_the_network(error) or any(isinstance(cause, ConnectionError) for cause in causes):
        return f"the hub cannot be reached ({text}); check the network, or {FILES}"
    return f"cannot be loaded ({text}); check its name and splits, or {FILES}"


def splits(data: Path, name: str) -> list[str]:
    """Return the splits that DATA has files of under that name. Raises DataError for none."""
    return list(_files(data, name))


def _recorded_name(path: Path, data: Path) -> str:
    """Return a file's name in a record: its path in DATA or, outside of it (`name` may be a path), folder and name."""
    # data and name are not resolved: a record does not depend on the links between a machine's folders
    return path.relative_to(data).as_posix() if path.is_relative_to(data) else f"{path.parent.name}/{path.name}"


def _files(data: Path, name: str) -> dict[str, list[Path]]:
    """Return the files of each split; an empty folder does not hide the file next to it. Raises DataError."""
    folder, files = data / name, _beside(data, name)
    inside = _inside(folder)
    if inside and files:
        raise DataError(f"{data}: has both {name}/ and {_names(files)}, expected one of them; remove the other")
    if inside:
        splits = dict.fromkeys(path.stem for path in inside)
        return {split: [path for path in inside if path.stem == split] for split in splits}
    if files:
        return {WHOLE: files}
    if folder.is_dir():
        raise DataError(f"{folder}: has no data; expected <split> with one of {', '.join(tables.ENDINGS)}")
    raise DataError(f"{data}: has neither {name}/ nor {name} with one of {', '.join(tables.ENDINGS)}")


def _inside(folder: Path) -> list[Path]:
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise _unseen(folder, error) from error
    return [path for path in paths if path.suffix in tables.ENDINGS and path.is_file()]


def _beside(data: Path, name: str) -> list[Path]:
    return [path for ending in tables.ENDINGS if (path := data / f"{name}{ending}").is_file()]


def _unseen(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)
