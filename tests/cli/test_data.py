"""prepare on the command line: where a release's text comes from, and what is told of every decision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from portllm import params
from portllm.cli import data, main
from portllm.params import EvolveParams, FetchParams, Params, ReleaseParams
from portllm.verbs import prepare


def whole(source: str, **releases: str | None) -> Params:
    recipes = {name: ReleaseParams(base="v0", source=real) for name, real in releases.items()}
    return Params(fetch=FetchParams(source=source), evolve=EvolveParams(releases=recipes), releases=("v0", *releases))


@pytest.mark.parametrize(
    ("source", "real", "texts"),
    [
        ("world", None, {"v0": "world", "v1": "world"}),
        ("scratch", None, {"v0": "corpora", "v1": "corpora"}),
        ("mistralai/Mistral-7B-v0.1", None, {"v0": "none", "v1": "corpora"}),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3", {"v0": "none", "v1": "none"}),
        ("world", "somewhere/else", {"v0": "world", "v1": "none"}),
    ],
)
def test_a_release_is_given_the_text_it_is_trained_on(source: str, real: str | None, texts: dict[str, str]) -> None:
    one = whole(source, v1=real)
    assert {release: prepare.text_of(one, f"corpus_{release}") for release in texts} == texts


def test_every_decision_is_told_in_words_that_take_its_count(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} is", "completion": str(n), "note": ""} for n in range(30)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]])
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    words = ["prepare", "mine", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--limit", "20", "--json"]
    done = CliRunner().invoke(main, ["--no-track", *words])
    decisions = json.loads(done.stdout)["decisions"]
    assert set(decisions) == {
        "beyond_limit", "byte_order_marks", "columns_not_used", "duplicates", "held_out", "spaces_added"
    }  # fmt: skip
    assert done.stderr.splitlines() == [
        f"prepare: mine: {data.DECISIONS[name].format(count)}" for name, count in decisions.items()
    ]
    assert all("{}" in said for said in data.DECISIONS.values())


def test_the_tasks_are_listed_with_what_can_be_done_with_them() -> None:
    done = CliRunner().invoke(main, ["tasks", "--json"])
    listed = {one["task"]: one for one in json.loads(done.stdout)["tasks"]}
    assert listed["gsm8k"] == {"task": "gsm8k", "output_type": "generate_until", "trainable": True}
    assert {"world_boolq", "sst2", "winogrande"} <= set(listed)
    assert "world_gsm8k  generate_until" in CliRunner().invoke(main, ["tasks"]).stdout


def test_the_profile_of_a_hub_base_prepares_a_record_alone(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("fetch: {source: me/model}\n", encoding="utf-8")
    assert params.load(tmp_path / "params.yaml").fetch.source == "me/model"
    words = ["--no-track", "prepare", "corpus_v0", "--params", tmp_path / "params.yaml", "--out", tmp_path / "v0"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "v0").iterdir()] == ["dataset.json"]
