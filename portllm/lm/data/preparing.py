"""A task's data, prepared: read, each row checked with the task's own definition, test rows kept out of training.

The last section has the selection of rows: the same for the same seed, whatever the machine.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import DataError
from portllm.lm.data import columns, own, sources, stock, tables, tasks
from portllm.lm.data.sources import Loaded

if TYPE_CHECKING:
    from pyarrow import Table

    from portllm.params import PrepareParams

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SPLIT = re.compile(r"[\w.-]+")
_NAME = re.compile(r"\w[\w.()-]*")  # some names of the harness contain parentheses
# names that the library `datasets` reads as file formats, not as datasets of the hub
_BUILDERS = frozenset({"parquet", "json", "csv", "text", "arrow", "webdataset", "imagefolder", "audiofolder"})


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A dataset before it is written: its splits, the definition of a user's own task, and the origin of the rows."""

    splits: Mapping[str, Table]
    origin: Loaded
    decisions: Mapping[str, int] = field(default_factory=dict)
    definition: str | None = None

    def write(self, folder: Path) -> None:
        """Write a parquet file for each split, and task.yaml for a user's own task."""
        for split, table in self.splits.items():
            tables.write(folder / f"{split}.parquet", table)
        if self.definition is not None:
            (folder / own.FILE).write_text(self.definition, encoding="utf-8")


def task(name: str, params: PrepareParams) -> Prepared:
    """Return the data of a task of the harness, or of a user's own, from files under `params.data` or the hub.

    Raises DataError for wrong data, EvaluationError for an unknown name.
    """
    if not _NAME.fullmatch(name):
        raise DataError(f"{name!r}: not the name of a task; expected only letters, digits, _, - and .")
    data = Path(params.data)
    found = sources.here(data, name)
    if found and stock.find(name) is None:
        return _own(name, sources.local(data, name), params)
    config = stock.definition(name, sources.names(data))
    names = list(dict.fromkeys(stock.splits(config).values()))
    if odd := [split for split in names if not _SPLIT.fullmatch(split)]:
        raise DataError(f"{name}: its split {odd[0]} is a part of another one; expected whole splits, one file each")
    loaded = sources.local(data, name, names) if found else _from_hub(name, config, names, params)
    return _harness(name, config, loaded, names, params)


def _from_hub(name: str, config: Mapping[str, Any], names: Sequence[str], params: PrepareParams) -> Loaded:
    repo, settings = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    if not repo or repo in _BUILDERS or config.get("custom_dataset"):
        raise DataError(f"{name}: expected a dataset of the hub, found {repo or 'data made by code'}; {sources.FILES}")
    settings.pop("trust_remote_code", None)
    revision = params.revisions.get(name, settings.pop("revision", None))
    return sources.hub(str(repo), config.get("dataset_name"), names, revision, **settings)


def _harness(
    name: str, config: Mapping[str, Any], loaded: Loaded, names: Sequence[str], params: PrepareParams
) -> Prepared:
    asked, trained = stock.asked_split(config), config.get("training_split")
    needed = [split for split in (trained, asked) if split]
    if missing := [split for split in needed if split not in loaded.splits]:
        raise DataError(
            f"{name}: has no split {missing[0]}; expected {missing[0]}.parquet, .jsonl or .csv in "
            f"{params.data}/{name}, found {', '.join(loaded.splits) or 'none of its splits'}"
        )
    splits = {
        split: columns.fit(name, table, where=f"{name}: {split}")
        for split in names
        if (table := loaded.splits.get(split)) is not None
    }  # fmt: skip
    if not trained:
        return Prepared(splits=splits, origin=loaded, decisions=loaded.decisions)
    questions = {
        split: list(tasks.asked(config, splits[split], name=name, split=split)) for split in dict.fromkeys(needed)
    }
    if trained == asked:  # as the harness defines it
        return Prepared(splits=splits, origin=loaded, decisions=loaded.decisions)
    rows = questions[trained]
    held = {key(one.question) for one in questions[asked]}
    keys = [key(one.question) for one in rows]
    decisions = Counter(loaded.decisions)
    decisions["duplicates"] = repeats([(one.question, one.pair) for one in rows])
    kept = without(keys, held)
    if not _same_rows(config, splits[trained], kept, held, len(keys)):
        # the definition generates rows: which row of the file each one comes from is unknown
        decisions["overlap_kept"] = len(keys) - len(kept)
        kept = list(range(splits[trained].num_rows))
    splits[trained], counts = _train(splits[trained], kept, name, params)
    return Prepared(splits=splits, origin=loaded, decisions=_positive([decisions, counts]))


def _same_rows(config: Mapping[str, Any], table: Table, kept: Sequence[int], held: Collection[str], asked: int) -> bool:
    """Return whether the `asked` rows of a definition are those of `table`, in its order, which `kept` counts in."""
    if asked != table.num_rows:
        return False
    if not config.get("process_docs") or not 0 < len(kept) < asked:
        return True
    # the definition may have changed the order: render the kept rows again, none of which may be held out
    name, split = str(config["task"]), str(config["training_split"])
    left = [key(one.question) for one in tasks.asked(config, table.take(list(kept)), name=name, split=split)]
    return len(left) == len(kept) and not set(held).intersection(left)


def _own(name: str, loaded: Loaded, params: PrepareParams) -> Prepared:
    fitted = {split: own.fit(table, where=f"{name}: {split}") for split, table in _own_splits(name, loaded).items()}
    chat = fitted[TRAIN].chat
    if any(one.chat != chat for one in fitted.values()):
        raise DataError(f"{name}: some splits contain prompts and completions, others chats; expected one form in all")
    if chat and params.output_type == "multiple_choice":
        raise DataError(f"{name}: chats have no multiple choice; pass --output-type loglikelihood or generate_until")
    splits = {split: own.table_of(one, f"{name}: {split}") for split, one in fitted.items()}
    keys = {split: [key(question) for question in one.questions] for split, one in fitted.items()}
    decisions = [loaded.decisions, *(one.decisions for one in fitted.values())]
    decisions.append({"duplicates": repeats(list(zip(fitted[TRAIN].questions, fitted[TRAIN].answers(), strict=True)))})
    if set(splits) == {TRAIN}:
        splits, counts = _held_out(name, splits[TRAIN], keys[TRAIN], params)
    else:
        held = {one for split, asked in keys.items() if split != TRAIN for one in asked}
        splits[TRAIN], counts = _train(splits[TRAIN], without(keys[TRAIN], held), name, params)
        both = set(keys.get(VALIDATION, ())) & set(keys.get(TEST, ()))
        counts = {**counts, "overlap_asked": sum(one in both for one in keys.get(TEST, ()))}
    choices: list[str] = []
    if params.output_type == "multiple_choice":
        splits, choices = own.with_labels(splits, name)
    definition = own.Definition(
        name=name,
        kind=params.output_type,
        splits=tuple(splits),
        chat=chat,
        choices=choices,
        answers=[answer for one in fitted.values() for answer in one.answers()],
    )
    return Prepared(
        splits=splits, origin=loaded, decisions=_positive([*decisions, counts]), definition=definition.text()
    )


def _own_splits(name: str, loaded: Loaded) -> dict[str, Table]:
    """Return train, validation and test, where they exist; the rows of a single file, whatever its name, are train."""
    if len(loaded.splits) == 1:
        return {TRAIN: next(iter(loaded.splits.values()))}
    expected = (TRAIN, VALIDATION, TEST)
    if TRAIN not in loaded.splits or not set(loaded.splits) <= set(expected):
        found = ", ".join(loaded.splits)
        raise DataError(
            f"{name}: expected files named {', '.join(expected)}, found {found}; rename or remove the others"
        )
    return {split: loaded.splits[split] for split in expected if split in loaded.splits}


def _held_out(
    name: str, table: Table, keys: Sequence[str], params: PrepareParams
) -> tuple[dict[str, Table], dict[str, int]]:
    """Hold out a share of the rows for validation and as many for test; rows with the same question stay together."""
    share = max(1, round(params.held_out * table.num_rows))
    numbers = hold_out(
        keys, {TEST: share, VALIDATION: share}, f"{params.seed}:{name}", rest=TRAIN
    )  # fmt: skip
    if empty := [split for split, rows in numbers.items() if not rows]:
        raise DataError(
            f"{name}: {table.num_rows} rows have {len(set(keys))} questions, too few to hold {share} out twice "
            f"({empty[0]} would be empty); give more rows, or a file for each of train, validation and test"
        )
    splits = {split: table.take(numbers[split]) for split in (TRAIN, VALIDATION, TEST)}
    held = len(numbers[VALIDATION]) + len(numbers[TEST])
    splits[TRAIN], counts = _limited(splits[TRAIN], name, params)
    return splits, {"held_out": held, **counts}


def _train(table: Table, kept: Sequence[int], name: str, params: PrepareParams) -> tuple[Table, dict[str, int]]:
    """Return the training rows whose question no evaluation row has, up to the limit."""
    if not kept:
        raise DataError(
            f"{name}: every one of {table.num_rows} training rows has the question of an evaluation row; none is left"
        )
    limited, counts = _limited(table.take(list(kept)), name, params)
    return limited, {"overlap": table.num_rows - len(kept), **counts}


def _limited(table: Table, name: str, params: PrepareParams) -> tuple[Table, dict[str, int]]:
    chosen = sample(table.num_rows, params.limit, f"{params.seed}:{name}:limit")
    return table.take(chosen), {"beyond_limit": table.num_rows - len(chosen)}


def _positive(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums of the counts, sorted by name, without zeros."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return {name: count for name, count in sorted(total.items()) if count}


# --- selection of rows ---


def key(text: str) -> str:
    """Return `text` without case, repeated white space and variants of a character, which no reader distinguishes."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def without(keys: Sequence[str], excluded: Collection[str]) -> list[int]:
    """Return the numbers of the rows whose key is not in `excluded`, in order."""
    lookup = set(excluded)
    return [number for number, one in enumerate(keys) if one not in lookup]


def repeats(items: Sequence[object]) -> int:
    """Return how many items repeat an earlier one."""
    return len(items) - len(set(items))


def sample(count: int, size: int, seed: str) -> list[int]:
    """Return `size` random numbers below `count`, in order; all where `size` is 0 or not below `count`."""
    if not 0 < size < count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), size))  # noqa: S311  (repeatable, no secret)


def hold_out(keys: Sequence[str], sizes: Mapping[str, int], seed: str, *, rest: str) -> dict[str, list[int]]:
    """Return the row numbers of each split: at random until it has its size, all others in the split `rest`.

    Rows with the same key stay in one split, so that no question of one is answered in another.
    """
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(keys):
        groups.setdefault(one, []).append(number)
    order = list(groups)
    random.Random(seed).shuffle(order)  # noqa: S311
    splits: dict[str, list[int]] = {split: [] for split in sizes}
    for split, count in sizes.items():
        while order and len(splits[split]) < count:
            splits[split] += groups[order.pop()]
    splits[rest] = [number for one in order for number in groups[one]]
    return {split: sorted(numbers) for split, numbers in splits.items()}
