"""An entry of the cache is used where it is exactly what it should be; whatever can change a score changes its key."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import OutputError
from portllm.lm.scoring import ledger
from portllm.lm.scoring.scored import ScoredDocument, ScoredTask

Made = Callable[..., Path]
KEY: dict[str, Any] = {"task": "sst2", "model": {"fingerprint": "ab"}, "params": {"limit": 0}}


def scored(task: str = "sst2") -> ScoredTask:
    right = ScoredDocument(
        doc_id=0, score=1.0, answer="1", target="1", metrics={"acc,none": 1.0}, loglikelihoods=(-1.25, -0.1)
    )
    words = ScoredDocument(doc_id=1, score=0.0, answer="ünï\n\ud800"[:4], target="", answers={"none": "x"})
    return ScoredTask(task=task, split="validation", metrics={"acc,none": 1 / 3}, documents=(right, words), truncated=1)


def entry(cache: Path) -> Path:
    (found,) = cache.rglob("scores/*/*.json")
    return found


def test_what_is_kept_is_found_again_to_the_last_digit(private_cache: Path) -> None:
    assert ledger.find(KEY) is None
    ledger.keep(KEY, scored())
    assert ledger.find(KEY) == scored()
    assert entry(private_cache).is_file()


def test_not_a_number_survives(private_cache: Path) -> None:
    strange = ScoredTask(
        task="sst2", split="test", metrics={"acc,none": 0.0},
        documents=(ScoredDocument(doc_id=0, score=math.nan, answer="", target=""),),
    )  # fmt: skip
    ledger.keep(KEY, strange)
    found = ledger.find(KEY)
    assert found is not None
    assert math.isnan(found.documents[0].score)


@pytest.mark.parametrize("other", [{"task": "rte"}, {"model": {"fingerprint": "ac"}}, {"params": {"limit": 1}}])
def test_another_key_finds_nothing(other: dict[str, Any]) -> None:
    ledger.keep(KEY, scored())
    assert ledger.find({**KEY, **other}) is None


def test_an_entry_moved_to_another_s_place_is_not_believed(private_cache: Path) -> None:
    ledger.keep(KEY, scored())
    text = entry(private_cache).read_bytes()
    entry(private_cache).unlink()
    other = {**KEY, "params": {"limit": 5}}
    ledger.keep(other, scored())
    entry(private_cache).write_bytes(text)
    assert ledger.find(other) is None


def test_no_changed_byte_is_believed(private_cache: Path) -> None:
    ledger.keep(KEY, scored())
    path = entry(private_cache)
    text = path.read_bytes()
    for at in range(0, len(text), 3):
        path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert ledger.find(KEY) in (None, scored()), text[at - 20 : at + 20]
        path.write_bytes(text[:at])
        assert ledger.find(KEY) is None


def _changed(text: str, change: Any) -> str:
    """Return an entry with its score changed, and a digest that fits."""
    tree = json.loads(text)
    change(tree["scored"])
    return json.dumps({**tree, "digest": ledger._digest(tree["scored"])})


@pytest.mark.parametrize(
    "change",
    [
        lambda score: score.update(task="rte"),
        lambda score: score["metrics"].update({"acc,none": "0.9"}),
        lambda score: score["metrics"].update({"acc,none": True}),
        lambda score: score["documents"][0].update(doc_id=1.5),
        lambda score: score["documents"][0].update(answers=[]),
        lambda score: score["documents"][0].pop("score"),
        lambda score: score.update(documents=None),
        lambda score: score.pop("truncated"),
    ],
)
def test_values_of_another_kind_are_not_believed(private_cache: Path, change: Any) -> None:
    ledger.keep(KEY, scored())
    path = entry(private_cache)
    path.write_text(_changed(path.read_text("utf-8"), change), "utf-8")
    assert ledger.find(KEY) is None


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000, "\udcff"])
def test_any_other_file_in_its_place_is_as_good_as_none(private_cache: Path, text: str) -> None:
    ledger.keep(KEY, scored())
    entry(private_cache).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert ledger.find(KEY) is None


def test_a_cache_that_cannot_be_written_gives_a_reason(private_cache: Path) -> None:
    """issue 8, item 16."""
    (private_cache / "portllm").write_text("a file where the directory should be")
    with pytest.raises(OutputError, match="cache of scores cannot be written"):
        ledger.keep(KEY, scored())
    assert ledger.find(KEY) is None


def test_a_user_without_a_home_has_no_cache(
    tmp_path: Path, make_checkpoint: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 8, item 16: a container may run as a user that the system does not list."""

    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", refuse)
    assert ledger.find(KEY) is None
    with pytest.raises(OutputError, match="home directory"):
        ledger.keep(KEY, scored())
    folder = make_checkpoint(tmp_path / "m", tensors())
    assert len(ledger.weights_identity(folder)["fingerprint"]) == 64, "without a cache of digests"


def tensors() -> dict[str, object]:
    import torch

    return {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "modeling_own.py", "merges.txt"]
)
def test_a_file_that_loading_reads_is_part_of_it(tmp_path: Path, make_checkpoint: Made, name: str) -> None:
    folder = make_checkpoint(tmp_path / "m", tensors())
    before = ledger.weights_identity(folder)
    (folder / name).write_text("{} ")
    assert ledger.weights_identity(folder) != before


@pytest.mark.parametrize("name", ["README.md", "port.json", "release.json", "pytorch_model.bin", ".gitattributes"])
def test_a_file_that_says_nothing_to_a_model_is_not(tmp_path: Path, make_checkpoint: Made, name: str) -> None:
    folder = make_checkpoint(tmp_path / "m", tensors())
    before = ledger.weights_identity(folder)
    (folder / name).write_text("x")
    assert ledger.weights_identity(folder) == before


def test_shards_are_of_no_consequence_and_values_are(tmp_path: Path, make_checkpoint: Made) -> None:
    one = ledger.weights_identity(make_checkpoint(tmp_path / "one", tensors()))
    two = ledger.weights_identity(make_checkpoint(tmp_path / "two", tensors(), shards=[["b.weight"], ["a.weight"]]))
    other = {**tensors(), "a.weight": tensors()["a.weight"] * 2}  # type: ignore[operator]
    assert one == two != ledger.weights_identity(make_checkpoint(tmp_path / "three", other))


def test_a_patch_s_configuration_is_part_of_it(tmp_path: Path, make_patch: Made) -> None:
    import torch

    pairs = {"q_proj": (torch.ones(2, 4), torch.ones(4, 2))}
    four, eight = (ledger.weights_identity(make_patch(tmp_path / str(a), pairs, lora_alpha=a)) for a in (4, 8))
    assert four["fingerprint"] == eight["fingerprint"]
    assert four != eight


def test_words_are_the_tokenizer_s_files_alone(tmp_path: Path, make_checkpoint: Made) -> None:
    folder = make_checkpoint(tmp_path / "m", tensors())
    (folder / "tokenizer.json").write_text("{}")
    assert set(ledger.tokenizer_identity(folder)) == {"tokenizer.json"}


def test_a_task_s_definition_is_that_of_the_installed_harness() -> None:
    assert "default.yaml" in ledger.definition_identity("sst2")
    assert "preprocess_winogrande.py" in ledger.definition_identity("winogrande")
    assert ledger.definition_identity("no_such_task_anywhere") == {}


def test_a_changed_file_shows_in_its_folder_s_state(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1")
    before = ledger.folder_state(tmp_path)
    assert ledger.folder_state(tmp_path) == before
    file.write_text("2")
    assert ledger.folder_state(tmp_path) != before


def test_none_of_it_needs_the_heavy_libraries() -> None:
    calls = "ledger.code_identity(); ledger.device_identity(); ledger.definition_identity('gsm8k')"
    heavy = "{'torch', 'transformers', 'lm_eval', 'peft', 'datasets'} & set(sys.modules)"
    script = "import sys\nfrom portllm.lm.scoring import ledger\n" + (
        f"{calls}\nsys.exit(str({heavy}) if {heavy} else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
