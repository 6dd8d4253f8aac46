"""A task by its name: its definition for evaluation, its folder of data, and its training pairs.

A name is, in this order, a task of the embedded world; a user's own, where DATA/<name>/task.yaml exists (see
portllm.lm.data.own); or the LM Evaluation Harness's. Training pairs of the latter two are the requests that the harness
makes of the same definition, so that training and evaluation have the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from portllm.checkpoint.record import provenance
from portllm.errors import DataError, EvaluationError
from portllm.lm.data import asking, columns, own, prompts, sources, stock, tables
from portllm.lm.data.encoding import Pair
from portllm.suggestions import did_you_mean_path
from portllm.world import datasets

if TYPE_CHECKING:
    from pyarrow import Table
    from transformers import PreTrainedTokenizerBase

Spec = str | dict[str, Any]
# where a task's data is looked for when no --data is given: where `prepare` writes in the documentation and in dvc.yaml
FOLDERS = (Path("data/tasks"), Path("data"))
# the harness's reader of a file, by ending
BUILDERS = {".parquet": "parquet", ".jsonl": "json"}


def spec(name: str, data: Path | None, tokenizer: PreTrainedTokenizerBase | None = None) -> Spec:
    """Return the harness's input to evaluate `name`: a definition on the files of DATA/<name>, or the bare name.

    With the bare name, where DATA has no such folder, the harness loads the hub's data at the latest commit. A chat
    task needs the `tokenizer`, for its template. Raises EvaluationError, and DataError also where DATA does not exist.
    """
    if name in datasets.TASKS:
        return on_files(_world(name), _world_files(name, data), name=name)
    expect_folder(data)
    folder = None if data is None else data / name
    if folder is None or not folder.is_dir():
        return name
    config = definition(name, folder.parent, tokenizer)
    named = stock.splits(config)
    files = {split: path for split in set(named.values()) if (path := split_file(folder, split))}
    asked = stock.asked_split(config)
    if asked not in files:
        raise DataError(
            f"{folder}: has no {asked}.parquet, on which {name} is evaluated; make it with `portllm prepare`"
        )
    config = {**_with_splits(config, named, files), **columns.adaptation(name, files[asked])}
    return on_files(config, files, name=name)


def expect_folder(data: Path | None) -> None:
    """Raise DataError where the named folder of data does not exist: a slip of the pen is no request to the hub."""
    if data is not None and not data.is_dir():
        raise DataError(
            f"{data}: no such folder; expected DATA/<task>/<split>.parquet, see --data and `portllm prepare`"
            f"{did_you_mean_path(data)}"
        )


def data_folder(name: str, data: Path | None) -> Path:
    """Return the folder of data that has the task `name`: `data` if given, else the first of FOLDERS that has it.

    Where none has it, the first of FOLDERS. Raises DataError where `data` is given and does not exist.
    """
    expect_folder(data)
    if data is not None:
        return data
    prepared = [folder for folder in FOLDERS if (folder / name).is_dir() and any((folder / name).iterdir())]
    return next(iter([*prepared, *(folder for folder in FOLDERS if sources.here(folder, name)), FOLDERS[0]]))


def training_folder(name: str, data: Path | None) -> Path:
    """Return the folder of data that has the files of the task `name`, which must exist.

    Raises DataError naming every folder that was searched, EvaluationError for a name that is no task.
    """
    folder = data_folder(name, data)
    if sources.here(folder, name):
        return folder
    expect_task(name, folder if data is None else data)
    searched = " and ".join(str(one / name) for one in (FOLDERS if data is None else (data,)))
    out = FOLDERS[0] if data is None else data
    raise DataError(
        f"{name}: no data found in {searched}; make it with `portllm prepare {name} --out {out / name}`"
        f"{', or pass --data DIR' if data is None else ''}"
    )


def expect_task(name: str, data: Path) -> None:
    """Raise EvaluationError with the nearest name where `name`, without files in `data`, is no task that is known."""
    if name not in datasets.TASKS and stock.find(name) is None:
        raise stock.unknown(name, own_names(data))


def own_names(data: Path) -> list[str]:
    """Return the names under which the folders of data hold something: `data` and, where it is one of them, FOLDERS."""
    folders = FOLDERS if data in FOLDERS else (data,)
    return sorted({name for folder in folders for name in sources.names(folder)})


def training_pairs(name: str, data: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Pair]:
    """Return (context, continuation) of every training row: the harness's request and the right answer.

    Raises DataError naming the row that has no right answer, EvaluationError where the task cannot be trained on.
    """
    if name in datasets.TASKS:
        rows = _rows(_world_files(name, data)["train"])
        return prompts.Prompts(_world(name)).pairs(rows)
    config = definition(name, data, tokenizer)
    split = config.get("training_split")
    if not split:
        raise EvaluationError(
            f"{name}: its definition has no training split, so no patch is trained on it; see `portllm tasks --all`"
        )
    path = split_file(data / name, str(split))
    if path is None:
        raise DataError(f"{data / name}: has no {split}.parquet; make it with `portllm prepare {name}`")
    table = columns.fit(name, tables.read(path).table, where=str(path))
    return [one.pair for one in asked(config, table, name=name, split=str(split))]


def digests(name: str, data: Path, part: Literal["all", "training", "evaluation"] = "all") -> dict[str, str]:
    """Return the digests of a task's files, by their names in DATA: all, those of training, or those of evaluation.

    A user's own definition is among them, the harness's is not.
    """
    config = _world(name) if name in datasets.TASKS else definition(name, data)
    trained = [] if part == "evaluation" else [config.get("training_split")]
    asked = [] if part == "training" else [stock.asked_split(config)]
    wanted = [*trained, *asked, *(stock.splits(config).values() if part == "all" else ())]
    found = [split_file(data / name, str(split)) for split in dict.fromkeys(wanted) if split]
    if own.is_own(data / name):
        found.append(data / name / own.FILE)  # which the user may edit
    return provenance.digests(path for path in found if path is not None)


def definition(name: str, data: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Return the harness's configuration of `name`, a user's own in DATA/<name> first. Raises PortllmError."""
    folder = data / name
    if own.is_own(folder):
        return own.load(folder, tokenizer)
    if sources.here(data, name) and stock.find(name) is None:
        raise DataError(
            f"{name}: prepare your own data first: `portllm prepare {name} --data {data} --out DIR/{name}`, "
            "then --data DIR"
        )
    return stock.definition(name, own_names(data))


def split_file(folder: Path, split: str) -> Path | None:
    """Return the file of a split that the harness can read as it is; None where there is none."""
    return next((path for ending in BUILDERS if (path := folder / f"{split}{ending}").is_file()), None)


def asked(config: Mapping[str, Any], table: Table, *, name: str, split: str) -> Iterator[asking.Asked]:
    """Yield every row of `table` as the harness requests it. Raises DataError where one does not fit the definition."""
    yield from asking.rows(asking.build(_in_memory(config, table, split), name=name), name=name, split=split)


def _in_memory(config: Mapping[str, Any], table: Table, split: str) -> dict[str, Any]:
    """Return the definition with `table` as its only split, in memory: no file is read, none is cached."""
    import datasets as hub

    rows = hub.Dataset(hub.table.InMemoryTable(table))
    few: dict[str, Any] = {"fewshot_split": None, "fewshot_config": {"samples": []}}  # no prompt here has examples
    only = {"training_split": split, "validation_split": split, "test_split": None, **few}
    nothing = {"dataset_path": None, "dataset_name": None, "dataset_kwargs": None}
    return {**config, **only, **nothing, "custom_dataset": lambda **_: {split: rows}}


def _with_splits(config: Mapping[str, Any], named: Mapping[str, str], files: Mapping[str, Path]) -> dict[str, Any]:
    """Return `config` without the splits that have no file, and without examples from one of them."""
    absent = {field: None for field, split in named.items() if split not in files}
    if "training_split" in absent and "fewshot_split" not in named or "fewshot_split" in absent:
        absent["fewshot_split"] = None
        few = {k: v for k, v in (config.get("fewshot_config") or {}).items() if k != "split"}
        return {**config, **absent, "fewshot_config": {"samples": [], **few}}
    return {**config, **absent}


def on_files(config: Mapping[str, Any], files: Mapping[str, Path], *, name: str) -> dict[str, Any]:
    """Return `config`, named `name`, with the file of each split instead of the hub. Raises EvaluationError."""
    for path in files.values():
        if not path.is_file():
            raise EvaluationError(f"{name}: {path} does not exist; make it with `portllm prepare`, or pass --data DIR")
    kinds = {BUILDERS[path.suffix] for path in files.values()}
    if len(kinds) > 1:
        raise DataError(f"{name}: its splits have several formats ({', '.join(sorted(kinds))}); `portllm prepare` it")
    sources = {split: str(path.resolve()) for split, path in sorted(files.items())}
    return {
        **{key: value for key, value in config.items() if key != "custom_dataset"},
        "task": name,
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": sources},
    }


def _world(name: str) -> dict[str, Any]:
    return prompts.load_task(datasets.task_file(name))


def _world_files(name: str, data: Path | None) -> dict[str, Path]:
    if data is None:
        raise DataError(f"{name}: a task of the embedded world is read from files; pass --data DIR")
    return {split: data / name / f"{split}.parquet" for split in datasets.SPLITS}


def _rows(path: Path) -> list[dict[str, Any]]:
    return tables.read_rows(path, ())
