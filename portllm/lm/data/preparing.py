"""A task's data made ready: read, checked row by row with the task's own definition, kept apart from what is asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import DataError
from portllm.lm.data import columns, own, own_rows, sources, splitting, stock, tables, tasks
from portllm.lm.data.sources import Loaded

if TYPE_CHECKING:
    from pyarrow import Table

    from portllm.params import PrepareParams

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SPLIT = re.compile(r"[\w.-]+")
_NAME = re.compile(r"\w[\w.()-]*")  # some of the harness's hold parentheses
# what the hub's library reads that is no dataset of the hub
_BUILDERS = frozenset({"parquet", "json", "csv", "text", "arrow", "webdataset", "imagefolder", "audiofolder"})


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A dataset ready to be written: its splits, the definition of a user's own task, and where it came from."""

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
    """The data of a task of the harness, or of a user's own, from files under `params.data` or the hub.

    Raises DataError for what is wrong with the data, EvaluationError for a name nobody knows.
    """
    if not _NAME.fullmatch(name):
        raise DataError(f"{name!r}: no name of a task; expected letters, digits, _, - and . alone")
    data = Path(params.data)
    found = sources.here(data, name)
    if found and stock.find(name) is None:
        return _own(name, sources.local(data, name), params)
    config = stock.definition(name, sources.names(data))
    wanted = list(dict.fromkeys(stock.splits(config).values()))
    if odd := [split for split in wanted if not _SPLIT.fullmatch(split)]:
        raise DataError(f"{name}: its split {odd[0]} is part of another, which no file can stand for")
    loaded = sources.local(data, name, wanted) if found else _from_hub(name, config, wanted, params)
    return _harness(name, config, loaded, wanted, params)


def _from_hub(name: str, config: Mapping[str, Any], wanted: Sequence[str], params: PrepareParams) -> Loaded:
    repo, settings = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    if not repo or repo in _BUILDERS or config.get("custom_dataset"):
        raise DataError(f"{name}: its data are no dataset of the hub but {repo or 'made by code'}; {sources.FILES}")
    settings.pop("trust_remote_code", None)
    revision = params.revisions.get(name, settings.pop("revision", None))
    return sources.hub(str(repo), config.get("dataset_name"), wanted, revision, **settings)


def _harness(
    name: str, config: Mapping[str, Any], loaded: Loaded, wanted: Sequence[str], params: PrepareParams
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
        for split in wanted
        if (table := loaded.splits.get(split)) is not None
    }  # fmt: skip
    if not trained:
        return Prepared(splits=splits, origin=loaded, decisions=loaded.decisions)
    questions = {
        split: list(tasks.asked(config, splits[split], name=name, split=split)) for split in dict.fromkeys(needed)
    }
    if trained == asked:  # so the harness defines it
        return Prepared(splits=splits, origin=loaded, decisions=loaded.decisions)
    rows = questions[trained]
    held = {splitting.key(one.question) for one in questions[asked]}
    keys = [splitting.key(one.question) for one in rows]
    decisions = Counter(loaded.decisions)
    decisions["duplicates"] = splitting.repeats([(one.question, one.pair) for one in rows])
    kept = splitting.without(keys, held)
    if not _same_rows(config, splits[trained], kept, held, len(keys)):
        # the definition makes rows of its own: which of the file's they come from is not known
        decisions["overlap_kept"] = len(keys) - len(kept)
        kept = list(range(splits[trained].num_rows))
    splits[trained], told = _train(splits[trained], kept, name, params)
    return Prepared(splits=splits, origin=loaded, decisions=_positive([decisions, told]))


def _same_rows(config: Mapping[str, Any], table: Table, kept: Sequence[int], held: Collection[str], asked: int) -> bool:
    """Whether the `asked` rows of a definition are those of `table` in their order, so that `kept` names the right."""
    if asked != table.num_rows:
        return False
    if not config.get("process_docs") or not 0 < len(kept) < asked:
        return True
    # it may have changed their order: ask once more what is left, in which nothing held may be
    name, split = str(config["task"]), str(config["training_split"])
    left = [splitting.key(one.question) for one in tasks.asked(config, table.take(list(kept)), name=name, split=split)]
    return len(left) == len(kept) and not set(held).intersection(left)


def _own(name: str, loaded: Loaded, params: PrepareParams) -> Prepared:
    fitted = {
        split: own_rows.fit(table, where=f"{name}: {split}") for split, table in _own_splits(name, loaded).items()
    }
    chat = fitted[TRAIN].chat
    if any(one.chat != chat for one in fitted.values()):
        raise DataError(f"{name}: some splits hold prompts and completions, others chats; bring all in one form")
    if chat and params.output_type == "multiple_choice":
        raise DataError(
            f"{name}: an answer of a chat is not chosen; take --output-type loglikelihood or generate_until"
        )
    made = {split: own_rows.table_of(one, f"{name}: {split}") for split, one in fitted.items()}
    keys = {split: [splitting.key(question) for question in one.questions] for split, one in fitted.items()}
    decisions = [loaded.decisions, *(one.decisions for one in fitted.values())]
    decisions.append(
        {"duplicates": splitting.repeats(list(zip(fitted[TRAIN].questions, fitted[TRAIN].answers(), strict=True)))}
    )
    if set(made) == {TRAIN}:
        made, told = _held_out(name, made[TRAIN], keys[TRAIN], params)
    else:
        held = {one for split, asked in keys.items() if split != TRAIN for one in asked}
        made[TRAIN], told = _train(made[TRAIN], splitting.without(keys[TRAIN], held), name, params)
        both = set(keys.get(VALIDATION, ())) & set(keys.get(TEST, ()))
        told = {**told, "overlap_asked": sum(one in both for one in keys.get(TEST, ()))}
    choices: list[str] = []
    if params.output_type == "multiple_choice":
        made, choices = own_rows.with_labels(made, name)
    definition = own.Definition(
        name=name,
        kind=params.output_type,
        splits=tuple(made),
        chat=chat,
        choices=choices,
        answers=[answer for one in fitted.values() for answer in one.answers()],
    )
    return Prepared(splits=made, origin=loaded, decisions=_positive([*decisions, told]), definition=definition.text())


def _own_splits(name: str, loaded: Loaded) -> dict[str, Table]:
    """train, validation and test as far as they are there; a single file, whatever its name, is all training rows."""
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
    """A share of the rows set apart for validation and as many for test, whole groups of rows that ask the same."""
    share = max(1, round(params.held_out * table.num_rows))
    numbers = splitting.hold_out(
        keys, {TEST: share, VALIDATION: share}, f"{params.seed}:{name}", rest=TRAIN
    )  # fmt: skip
    if empty := [split for split, rows in numbers.items() if not rows]:
        raise DataError(
            f"{name}: {table.num_rows} rows ask {len(set(keys))} different things, too few to set {share} apart twice "
            f"({empty[0]} would be empty); bring more rows, or a file for each of train, validation and test"
        )
    splits = {split: table.take(numbers[split]) for split in (TRAIN, VALIDATION, TEST)}
    held = len(numbers[VALIDATION]) + len(numbers[TEST])
    splits[TRAIN], told = _limited(splits[TRAIN], name, params)
    return splits, {"held_out": held, **told}


def _train(table: Table, kept: Sequence[int], name: str, params: PrepareParams) -> tuple[Table, dict[str, int]]:
    """The training rows that nothing asked equals, as many as the limit lets through."""
    if not kept:
        raise DataError(
            f"{name}: every one of {table.num_rows} training rows is asked in evaluation too; nothing is left"
        )
    limited, told = _limited(table.take(list(kept)), name, params)
    return limited, {"overlap": table.num_rows - len(kept), **told}


def _limited(table: Table, name: str, params: PrepareParams) -> tuple[Table, dict[str, int]]:
    chosen = splitting.sample(table.num_rows, params.limit, f"{params.seed}:{name}:limit")
    return table.take(chosen), {"beyond_limit": table.num_rows - len(chosen)}


def _positive(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The counts added up, sorted by name, without what never happened."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return {name: count for name, count in sorted(total.items()) if count}
