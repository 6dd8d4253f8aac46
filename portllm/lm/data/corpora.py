"""Real text to train a release on: plain text and instruction data, rendered in one documented form.

    columns                               rendered as
    instruction, input, output            ### Instruction: … ### Input: … ### Response: … (Alpaca, AlpacaGPT4, Platypus)
    system_prompt, question, response     ### System: … ### Instruction: … ### Response: … (OpenOrca)
    conversations, messages               the same three headings, a part for each message (SlimOrca, chats)
    text                                  as it is
    those of one of the seven tasks       its text, one column a line, without the labels

A heading has a line of its own, its text follows it, a blank line separates the parts; a part without text is left
out. A text file has documents separated by blank lines. Sources joined by + are read one after the other, completely.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import DataError
from portllm.lm.data import columns, own, preparing, sources, tables
from portllm.lm.data.preparing import TEST, TRAIN, Prepared

if TYPE_CHECKING:
    from pyarrow import Table

    from portllm.params import CorpusParams

# the paper's updates by name
KNOWN: Mapping[str, str] = {
    "OpenOrca": "Open-Orca/OpenOrca",
    "SlimOrca": "Open-Orca/SlimOrca",
    "Open-Platypus": "garage-bAInd/Open-Platypus",
    "AlpacaGPT4": "vicgalle/alpaca-gpt4",
}
_HEADINGS = {"system": "### System:", "user": "### Instruction:", "assistant": "### Response:", "input": "### Input:"}
JOINED = "+"
Parts = Sequence[tuple[str, str | None]]


def corpus(release: str, recipe: CorpusParams, data: Path, seed: int) -> Prepared:
    """Return the texts of `release`, column `text`: `recipe.rows` to train on, `recipe.test_rows` held out.

    The source is a folder or file in `data`, a known name, or a dataset of the hub, or several joined by `+`, of
    which the training splits are read. Raises DataError.
    """
    loaded, decisions, texts = _read(recipe, data, seed)
    mark = f"{seed}:corpus_{release}"
    test = texts.get(TEST, [])
    if TEST in texts:
        test = [test[i] for i in preparing.sample(len(test), recipe.test_rows, f"{mark}:test")]
        train = texts[TRAIN]
    else:
        train, test = _apart(texts[TRAIN], recipe, mark)
    asked = {preparing.key(text) for text in test}
    kept = preparing.without([preparing.key(text) for text in train], asked)
    decisions["overlap"] = len(train) - len(kept)
    chosen = [train[kept[i]] for i in preparing.sample(len(kept), recipe.rows, f"{mark}:train")]
    if not chosen:
        raise DataError(f"{recipe.source}: no text is left to train {release} on; give more text, or lower test_rows")
    decisions["beyond_limit"] += len(kept) - len(chosen)
    decisions["duplicates"] = preparing.repeats(chosen)
    splits = {TRAIN: _column(chosen), **({TEST: _column(test)} if test else {})}
    counted = {name: count for name, count in sorted(decisions.items()) if count}
    return Prepared(splits=splits, origin=loaded, decisions=counted)


def joined(source: str) -> list[str]:
    """Return the sources that `source` joins. Raises DataError where one has no name or occurs twice."""
    names = source.split(JOINED)
    if odd := [name for name in names if not name or names.count(name) > 1]:
        what = f"{odd[0]} occurs twice" if odd[0] else "one of them has no name"
        raise DataError(f"{source}: expected sources joined by {JOINED}, each once, found that {what}")
    return names


def documents(table: Table, where: str, decisions: Counter[str]) -> list[str]:
    """Return every row of `table` as text, in the form of its columns; rows without text are only counted (`empty`).

    Raises DataError where the columns have no known form, or a value is not text.
    """
    render = _form(table, where)
    rows = table.to_pylist()
    texts = [render(row, f"{where}: row {number}") for number, row in enumerate(rows)]
    kept = [text for text in texts if text.strip()]
    decisions["empty"] += len(texts) - len(kept)
    decisions["message_keys_not_used"] += own.unused_keys(row.get(_chat(table)) for row in rows)
    if not kept:
        raise DataError(f"{where}: none of {len(texts)} rows has any text")
    return kept


def _read(recipe: CorpusParams, data: Path, seed: int) -> tuple[sources.Loaded, Counter[str], dict[str, list[str]]]:
    """Return the origin of the texts, the decisions about them, and the texts of each split."""
    names = joined(recipe.source)
    # several sources have no common test split: rows are held out of the training splits of all
    wanted = (TRAIN, TEST) if len(names) == 1 else (TRAIN,)
    revisions = _revisions(recipe, names)
    each = {
        name: _load(dataclasses.replace(recipe, source=name, revision=revisions[name]), data, wanted, seed)
        for name in names
    }
    decisions: Counter[str] = Counter()
    texts: dict[str, list[str]] = {}
    for name, part in each.items():
        decisions.update(part.decisions)
        for split in part.splits:
            texts.setdefault(split, []).extend(documents(part.splits[split], f"{name}: {split}", decisions))
    if len(each) == 1:
        return each[recipe.source], decisions, texts
    found = JOINED.join(part.revision or "" for part in each.values())
    origin = sources.Loaded(
        splits={},
        source=sources.LOCAL if {part.source for part in each.values()} == {sources.LOCAL} else recipe.source,
        revision=found if found.strip(JOINED) else None,
        files={path: digest for part in each.values() for path, digest in part.files.items()},
    )
    return origin, decisions, texts


def _revisions(recipe: CorpusParams, names: Sequence[str]) -> dict[str, str | None]:
    """Return the revision of each source from the form in dataset.json: joined like the sources, '' for none."""
    if len(names) == 1 or recipe.revision is None:
        return dict.fromkeys(names, recipe.revision)
    given = recipe.revision.split(JOINED)
    if len(given) != len(names):
        raise DataError(
            f"{recipe.source}: joins {len(names)} sources, revision {recipe.revision} has {len(given)}; give one for "
            f"each, joined by {JOINED}, nothing for files or the latest commit"
        )
    return {name: revision or None for name, revision in zip(names, given, strict=True)}


def _load(recipe: CorpusParams, data: Path, wanted: Sequence[str], seed: int) -> sources.Loaded:
    if sources.here(data, recipe.source):
        found = sources.splits(data, recipe.source)
        if TRAIN in found:
            return sources.local(data, recipe.source, wanted)
        if len(found) == 1:
            loaded = sources.local(data, recipe.source)
            return dataclasses.replace(loaded, splits={TRAIN: loaded.splits[found[0]]})
        raise DataError(f"{data / recipe.source}: expected train and perhaps test, found {', '.join(found)}")
    repo = KNOWN.get(recipe.source, recipe.source)
    if "/" not in repo:
        raise DataError(
            f"{recipe.source}: neither in {data} nor a known corpus ({', '.join(KNOWN)}) nor a dataset of the hub "
            "(OWNER/NAME); put its files there, or correct prepare.corpora"
        )
    rows = recipe.rows + recipe.test_rows if recipe.rows else 0
    return sources.hub(
        repo, None, [TRAIN], recipe.revision, choose=lambda count: preparing.sample(count, rows, f"{seed}:{repo}")
    )


def _apart(texts: Sequence[str], recipe: CorpusParams, mark: str) -> tuple[list[str], list[str]]:
    """Return the texts to train on, and those held out at random."""
    if 2 * recipe.test_rows > len(texts):
        raise DataError(
            f"{recipe.source}: has {len(texts)} texts, expected at least twice test_rows, {recipe.test_rows}; "
            "lower test_rows to less than half"
        )
    held = set(preparing.sample(len(texts), recipe.test_rows, f"{mark}:test")) if recipe.test_rows else set()
    train = [text for number, text in enumerate(texts) if number not in held]
    return train, [texts[number] for number in sorted(held)]


def _form(table: Table, where: str) -> Callable[[Mapping[str, Any], str], str]:
    """Return the function that renders a row; instruction data precede `text`, which some have as well."""
    names = set(table.column_names)
    if {"instruction", "output"} <= names:
        return lambda row, at: _instruction(row, at)
    if {"question", "response"} <= names:
        return lambda row, at: _parts(
            [("system", row.get("system_prompt")), ("user", row["question"]), ("assistant", row["response"])], at
        )
    if column := _chat(table):
        return lambda row, at: _parts([(one["role"], one["content"]) for one in own.messages(row[column], at)], at)
    if tables.TEXT in names:
        return lambda row, at: _checked(row[tables.TEXT], at) or ""
    # the task with the most columns of text here: sst2's only column is one of winogrande's
    if names_of_text := max(
        (task.text for task in columns.KNOWN.values() if names.issuperset(task.text)), key=len, default=()
    ):
        return lambda row, at: "\n".join(_checked(row[column], at) or "" for column in names_of_text)
    raise DataError(
        f"{where}: expected the columns text; instruction and output; question and response; messages; or a task's; "
        f"found {', '.join(table.column_names)}"
    )


def _chat(table: Table) -> str:
    """Return the column of chats; "" where the rows have another form."""
    names = set(table.column_names)
    if {"instruction", "output"} <= names or {"question", "response"} <= names:
        return ""
    return next((column for column in (own.MESSAGES, own.CONVERSATIONS) if column in names), "")


def _instruction(row: Mapping[str, Any], where: str) -> str:
    return _parts([("user", row["instruction"]), ("input", row.get("input")), ("assistant", row["output"])], where)


def _parts(parts: Parts, where: str) -> str:
    """Return the parts with their headings; an empty text where there is no answer."""
    texts = [(speaker, (_checked(text, where) or "").strip()) for speaker, text in parts]
    if not any(text for speaker, text in texts if speaker == "assistant"):
        return ""
    return "\n\n".join(f"{_HEADINGS[speaker]}\n{text}" for speaker, text in texts if text)


def _checked(text: Any, where: str) -> str | None:
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where} has {text!r:.60}, expected text")
    return text


def _column(texts: Sequence[str]) -> Table:
    import pyarrow as pa

    return pa.table({tables.TEXT: pa.array(list(texts), pa.string())})
