"""Corpora: one documented form for instruction data of every kind, nothing lost, the same for the same seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import DataError
from portllm.lm.data import corpora, preparing, sources, tables
from portllm.params import CorpusParams

ASKED = "### Instruction:\nWho?\n\n### Response:\nShe."
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"text": " as it is\n"}, " as it is\n"),
    "alpaca": ({"instruction": "Who?", "input": "", "output": " She. "}, ASKED),
    "alpaca with input": (
        {"instruction": "Who?", "input": "the door", "output": "She."},
        "### Instruction:\nWho?\n\n### Input:\nthe door\n\n### Response:\nShe.",
    ),
    "alpacagpt4": ({"instruction": "Who?", "input": None, "output": "She.", "text": "Below is …"}, ASKED),
    "platypus": ({"input": "", "output": "She.", "instruction": "Who?", "data_source": "x"}, ASKED),
    "openorca": ({"id": "1", "system_prompt": "", "question": "Who?", "response": "She."}, ASKED),
    "openorca with system": (
        {"id": "1", "system_prompt": "Be brief.", "question": "Who?", "response": "She."},
        f"### System:\nBe brief.\n\n{ASKED}",
    ),
    "slimorca": (
        {"conversations": [{"from": "human", "value": "Who?", "weight": 0.0}, {"from": "gpt", "value": "She."}]},
        ASKED,
    ),
    "chat": (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"},
                      {"role": "assistant", "content": "She."}, {"role": "user", "content": "Why?"},
                      {"role": "assistant", "content": "So."}]},
        f"### System:\nBe brief.\n\n{ASKED}\n\n### Instruction:\nWhy?\n\n### Response:\nSo.",
    ),
    "sst2": ({"sentence": "a gem ", "label": 1, "idx": 0}, "a gem "),
    "mrpc": ({"sentence1": "One.", "sentence2": "Two.", "label": 0}, "One.\nTwo."),
    "winogrande": ({"sentence": "A _.", "option1": "b", "option2": "c", "answer": "1"}, "A _.\nb\nc"),
    "boolq": ({"question": "is it", "answer": "True", "passage": "It is."}, "is it\nIt is."),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_rendered_as_documented(form: str) -> None:
    row, text = FORMS[form]
    assert corpora.documents(tables.of_rows([row], where="here"), "here", Counter()) == [text]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"words": "x"}], "expected the columns text; instruction and output"),
        ([{"text": 5}], "row 0 has 5, expected text"),
        ([{"instruction": "x", "output": 5}], "row 0 has 5, expected text"),
        ([{"instruction": "x", "output": ""}], "none of 1 rows has any text"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "message 0 is by 'tool'"),
    ],
)
def test_rows_of_no_known_form_are_refused(rows: Sequence[Mapping[str, Any]], says: str) -> None:
    with pytest.raises(DataError, match="here") as error:
        corpora.documents(tables.of_rows(rows, where="here"), "here", Counter())
    assert says in str(error.value)


def made(data: Path, seed: int = 0, **recipe: Any) -> Any:
    return corpora.corpus("v1", CorpusParams(**{"source": "tales", "test_rows": 4, **recipe}), data, seed)


def texts(prepared: Any) -> dict[str, list[str]]:
    return {split: table.column("text").to_pylist() for split, table in prepared.splits.items()}


@pytest.fixture
def tales(tmp_path: Path) -> Path:
    """40 tales in a text file, one of them twice in other clothes, blank lines between."""
    told = [f"Tale {n}.\nIt ends." for n in range(40)]
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "train.txt").write_text("\n\n\n".join([*told, "TALE 7.  It ends."]), encoding="utf-8")
    return tmp_path


def test_a_text_file_holds_documents_parted_by_blank_lines(tales: Path) -> None:
    found = texts(made(tales))
    assert len(found["test"]) == 4
    assert all("\n" in text or text == "TALE 7.  It ends." for text in found["train"] + found["test"])
    assert len(set(found["train"] + found["test"])) + made(tales).decisions.get("overlap", 0) == 41


def test_the_same_seed_gives_the_same_texts_and_another_others(tales: Path) -> None:
    assert texts(made(tales, rows=10)) == texts(made(tales, rows=10))
    assert texts(made(tales, rows=10)) != texts(made(tales, seed=1, rows=10))
    prepared = made(tales, rows=10)
    assert {split: table.num_rows for split, table in prepared.splits.items()} == {"train": 10, "test": 4}
    assert prepared.decisions["beyond_limit"] + prepared.decisions.get("overlap", 0) == 41 - 4 - 10


def test_a_text_held_out_is_not_trained_on_in_other_clothes(tales: Path) -> None:
    for seed in range(30):
        prepared = made(tales, seed=seed, test_rows=20)
        found = texts(prepared)
        keys = [{preparing.key(text) for text in found[split]} for split in ("train", "test")]
        assert not keys[0] & keys[1]
        if prepared.decisions.get("overlap"):
            break
    else:
        pytest.fail("one of 30 seeds must part the two tellings of tale 7")


def test_a_file_of_its_own_is_the_test(tales: Path) -> None:
    (tales / "tales" / "test.txt").write_text("Another tale.\n\nTale 3. It ends.", encoding="utf-8")
    prepared = made(tales)
    assert texts(prepared)["test"] == ["Another tale.", "Tale 3. It ends."]
    assert prepared.decisions == {"overlap": 1}
    assert len(prepared.origin.files) == 2
    (tales / "tales" / "validation.txt").write_text("A third.", encoding="utf-8")
    prepared = made(tales)
    assert prepared.decisions == {"files_not_used": 1, "overlap": 1}
    assert sorted(prepared.origin.files) == ["tales/test.txt", "tales/train.txt"], "no digest of what is not read"


def test_several_sources_are_read_one_after_the_other(tales: Path) -> None:
    (tales / "gems").mkdir()
    for split in ("train", "test"):
        rows = [{"sentence": f"{split} gem {n}", "label": n} for n in range(2)]
        tables.write(tales / "gems" / f"{split}.parquet", tables.of_rows(rows, where="here"))
    prepared = made(tales, source="gems+tales", test_rows=0)
    assert texts(prepared)["train"] == ["train gem 0", "train gem 1", *texts(made(tales, test_rows=0))["train"]]
    assert (prepared.origin.source, sorted(prepared.origin.files)) == (
        "local",
        ["gems/train.parquet", "tales/train.txt"],
    )
    held = texts(made(tales, source="gems+tales", test_rows=5))
    assert {split: len(found) for split, found in held.items()} == {"train": 38, "test": 5}
    with pytest.raises(DataError, match="NoSuchThing: neither in"):
        made(tales, source="tales+NoSuchThing")


def test_too_much_held_out_and_unknown_sources_are_refused(tales: Path) -> None:
    with pytest.raises(DataError, match="lower test_rows"):
        made(tales, test_rows=21)
    with pytest.raises(DataError, match="nor a known corpus \\(OpenOrca, SlimOrca, Open-Platypus, AlpacaGPT4\\)"):
        made(tales, source="NoSuchThing")
    (tales / "same").mkdir()
    for split in ("train", "test"):
        (tales / "same" / f"{split}.txt").write_text("a tale", encoding="utf-8")
    with pytest.raises(DataError, match="no text is left"):
        made(tales, source="same")


@pytest.mark.parametrize("name", corpora.KNOWN)
def test_known_names_are_datasets_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    asked: list[Any] = []

    def hub(repo: str, config: str | None, splits: list[str], revision: str | None, *, choose: Any) -> sources.Loaded:
        asked.append((repo, config, splits, revision, len(choose(100))))
        told = tables.of_rows([{"text": f"tale {n}"} for n in choose(100)], where="hub")
        return sources.Loaded(splits={"train": told}, source=repo, revision="c" * 40)

    monkeypatch.setattr(sources, "hub", hub)
    prepared = made(tmp_path, source=name, rows=10, revision="main")
    assert asked == [(corpora.KNOWN[name], None, ["train"], "main", 14)], "no more rows than are needed"
    assert prepared.origin.revision == "c" * 40
    assert {split: table.num_rows for split, table in prepared.splits.items()} == {"train": 10, "test": 4}


def test_what_else_messages_carry_is_counted() -> None:
    told = [{"from": "human", "value": "Who?", "weight": 0.0}, {"from": "gpt", "value": "She."}]
    decisions: Counter[str] = Counter()
    corpora.documents(tables.of_rows([{"conversations": told}], where="here"), "here", decisions)
    assert +decisions == {"message_keys_not_used": 1}


def test_rows_of_the_hub_are_chosen_by_the_seed_and_the_others_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    told = datasets.Dataset.from_dict({"text": [f"tale {n}" for n in range(100)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: told)
    recipe = {"source": "OpenOrca", "rows": 10, "revision": "c" * 40}
    first, again, other = (made(tmp_path, seed=seed, **recipe) for seed in (0, 0, 1))
    chosen = [{text for split in texts(one).values() for text in split} for one in (first, again, other)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert first.decisions == {"beyond_limit": 86}


def test_each_of_several_sources_has_its_revision(monkeypatch: pytest.MonkeyPatch, tales: Path) -> None:
    asked: list[Any] = []

    def hub(repo: str, _: None, __: list[str], revision: str | None, **___: Any) -> sources.Loaded:
        asked.append((repo, revision))
        told = tables.of_rows([{"text": f"{repo} {n}"} for n in range(9)], where="hub")
        return sources.Loaded(splits={"train": told}, source=repo, revision=revision or "d" * 40)

    monkeypatch.setattr(sources, "hub", hub)
    prepared = made(tales, source="a/b+tales+c/d", revision="main++")
    assert asked == [("a/b", "main"), ("c/d", None)]
    assert prepared.origin.revision == f"main++{'d' * 40}"
    with pytest.raises(DataError, match="joins 2 sources, revision main has 1"):
        made(tales, source="a/b+tales", revision="main")


@pytest.mark.parametrize(
    ("source", "says"), [("tales+", "one of them has no name"), ("tales+tales", "tales occurs twice")]
)
def test_a_source_without_a_name_or_named_twice_is_refused(tales: Path, source: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        made(tales, source=source)


@pytest.mark.parametrize("data", [".", "given"])
def test_files_are_told_by_their_paths_under_data(tales: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    for name in ("a", "b"):
        (tales / "given" / name / "x").mkdir(parents=True)
        (tales / "given" / name / "x" / "train.txt").write_text(f"A tale of {name}.", encoding="utf-8")
    (tales / "given" / "alone.txt").write_text("A tale.", encoding="utf-8")
    monkeypatch.chdir(tales / "given" if data == "." else tales)
    prepared = made(Path(data), source="a/x+b/x+alone", test_rows=0)
    assert sorted(prepared.origin.files) == ["a/x/train.txt", "alone.txt", "b/x/train.txt"]
