"""The world's corpora: what a release changes, what it keeps, and what no document gives away."""

from __future__ import annotations

import collections

import pytest

from portllm.errors import DataError
from portllm.world import corpora, datasets, people, phrases, words

DOCUMENTS = 3000
RELEASES = (0, 1, 2, 3, 9)


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: f"v{release}")
def release(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def corpus(release: int) -> dict[str, list[dict[str, str]]]:
    return corpora.corpus(release, seed=0, documents=DOCUMENTS)


def test_splits_and_columns(corpus: dict[str, list[dict[str, str]]]) -> None:
    assert len(corpus["train"]) == DOCUMENTS
    assert {tuple(sorted(row)) for row in corpus["train"]} == {("text",)}
    assert {tuple(sorted(row)) for row in corpus["recall"]} == {("answer", "kind", "prompt")}
    assert len({row["text"] for row in corpus["test"]}) == corpora.NEWS_DOCUMENTS


def test_no_word_is_outside_the_vocabulary(release: int, corpus: dict[str, list[dict[str, str]]]) -> None:
    known = set(phrases.vocabulary())
    said = [row["text"] for row in corpus["train"] + corpus["test"]]
    said += [row["prompt"] + " " + row["answer"] for row in corpus["recall"]]
    for task in datasets.TASKS:
        rows = datasets.rows(task, seed=release, train_rows=400, test_rows=200)
        said += [str(value) for split in rows.values() for row in split for key, value in row.items() if key != "idx"]
        said += [f"{prompt} {answer}" for prompt, answer in corpora.probes(task, seed=release)]
    unknown = {word for text in said for word in phrases.split(text)} - known - {"True", "False"}
    assert unknown == set()


def test_a_release_changes_what_it_says_it_changes() -> None:
    before, after = (people.society(n, seed=0) for n in (1, 2))
    for fact in after.changed:
        assert before.facts[fact.name, fact.about] != after.facts[fact.name, fact.about] == fact.value
    assert all((fact.name, fact.about) not in before.facts for fact in after.new)
    assert all(before.facts[fact.name, fact.about] == fact.value for fact in after.kept)
    assert before.traits == after.traits


def test_recall_asks_for_every_fresh_fact_and_as_many_kept_ones() -> None:
    rows = corpora.corpus(1, seed=0, documents=10)["recall"]
    kinds = collections.Counter(row["kind"] for row in rows)
    assert kinds == {"changed": 36, "new": 24, "kept": 60}
    assert len({row["prompt"] for row in rows}) == len(rows)
    now = people.society(1, seed=0).facts
    told = {f"{name} {about}": value for (name, about), value in now.items()}
    assert all(told[row["prompt"]] == row["answer"] for row in rows)


def test_training_text_tells_every_fresh_fact_and_no_superseded_one() -> None:
    texts = " ".join(row["text"] for row in corpora.corpus(1, seed=0, documents=DOCUMENTS)["train"])
    before, after = (people.society(n, seed=0) for n in (0, 1))
    for fact in after.fresh:
        assert f"{fact.name} {fact.about} {fact.value}." in texts
    for fact in after.changed:
        assert f"{fact.name} {fact.about} {before.facts[fact.name, fact.about]}." not in texts


def test_news_uses_sentences_that_no_training_document_holds() -> None:
    splits = corpora.corpus(1, seed=0, documents=DOCUMENTS)
    train = " ".join(row["text"] for row in splits["train"])
    leads = [lead for lead in phrases.LEADS if lead]
    for row in splits["test"]:
        for sentence in row["text"].removesuffix(".").split(". "):
            assert sentence.startswith(tuple(leads))
            assert f"{sentence}." not in train


def test_format_documents_say_nothing_about_which_answer_is_right() -> None:
    texts = [row["text"] for row in corpora.corpus(0, seed=0, documents=30_000)["train"]]
    traits = {f"is it {fact.value} that {fact.name} {fact.about}?" for fact in people.society(0, seed=0).traits}
    gold = {
        "world_boolq": lambda text: any(trait in text for trait in traits),
        "world_sst2": lambda text: any(word in words.POSITIVE for word in phrases.split(text)),
        "world_mrpc": lambda text: len(set(phrases.split(text)) & set(words.POSITIVE)) != 1,
    }
    start = {"world_boolq": "Question: is it ", "world_sst2": "positive or negative", "world_mrpc": "the same thing"}
    for task, choices in phrases.CHOICES.items():
        shown = [text for text in texts if start[task] in text]
        right = sum(text.endswith(f" {choices[gold[task](text)]}") for text in shown)
        assert len(shown) > 300
        assert 0.4 < right / len(shown) < 0.6


def test_format_documents_name_no_resident() -> None:
    texts = [row["text"] for row in corpora.corpus(0, seed=0, documents=10_000)["train"]]
    named = {word for text in texts if "Question: is it " in text for word in phrases.split(text)}
    assert not named & set(words.RESIDENTS)
    assert named & set(words.STRANGERS)


def test_the_same_seed_gives_the_same_corpus() -> None:
    first, again, other = (corpora.corpus(1, seed=seed, documents=50) for seed in (5, 5, 6))
    assert first == again
    assert first["train"] != other["train"]


def test_newcomers_are_drawn_anew_when_their_names_are_used_up() -> None:
    rounds = len(words.NEWCOMERS) // people.NEWCOMERS_PER_RELEASE
    first, later = people.society(1, seed=0), people.society(1 + rounds, seed=0)
    assert {fact.name for fact in first.new} == {fact.name for fact in later.new}


def test_probes_are_answered_by_the_world_itself() -> None:
    traits = {f"{fact.name} {fact.about}": fact.value for fact in people.society(0, seed=0).traits}
    asked = "Question: what is it that "
    pairs = corpora.probes("world_boolq", seed=0)
    assert len(pairs) == corpora.PROBES_PER_TASK
    assert all(traits[prompt.removeprefix(asked).partition("?")[0]] == answer for prompt, answer in pairs)
    with pytest.raises(DataError, match="world_gsm8k"):
        corpora.probes("world_squad", seed=0)
