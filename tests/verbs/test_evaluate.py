"""One evaluation after another, by one process or several: the same figures, and nothing scored twice."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portllm.checkpoint.record.records import PortRecord, Source
from portllm.errors import OutputError, PatchError
from portllm.lm.learning import llama
from portllm.lm.scoring import evaluation
from portllm.lm.scoring.scored import ScoredDocument, ScoredTask
from portllm.lm.scoring.scoring import PlannedScore
from portllm.params import ArchitectureParams, EvaluateParams
from portllm.verbs import evaluate
from portllm.world import tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
ROOT = Path(__file__).parents[2]
PARAMS = EvaluateParams(threads=1, batch_size=4)
TASKS = ["sst2", "gsm8k"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters for it, a ported checkpoint, and the data of two of the harness's own tasks."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("evaluate")
    words = tokenizer.build()
    for seed, name in enumerate(("base", "ported")):
        shape = ArchitectureParams(hidden_size=16, intermediate_size=16, layers=1, heads=1)
        llama.new_llama(words, shape, seed=seed).save_pretrained(root / name)
        words.save_pretrained(root / name)
        config = json.loads((root / name / "config.json").read_text())
        # gsm8k's answers may be 256 tokens long
        (root / name / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 320}))
    source = Source(name="base", fingerprint=None)
    PortRecord(base=source, patch=source, task="sst2").write(root / "ported")
    for alpha in (2, 200):
        model, _ = evaluation.load_model(root / "base")
        lora = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(root / "patches" / str(alpha))
    facts = [
        {"sentence": f"Anna likes {word}", "label": i % 2, "idx": i}
        for i, word in enumerate(sorted(words.get_vocab())[:40])
    ]
    sums = [{"question": f"Anna has {i} cakes", "answer": f"#### {i}"} for i in range(6)]
    files = [("sst2", "validation", facts), ("sst2", "train", facts), ("gsm8k", "test", sums), ("gsm8k", "train", sums)]
    for task, split, rows in files:
        (root / "data" / task).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "data" / task / f"{split}.parquet")
    return root


def score(made: Path, out: Path, **changed: Any) -> evaluate.Evaluation:
    arguments: dict[str, Any] = {"model": made / "base", "tasks": TASKS, "params": PARAMS, "data": made / "data"}
    arguments |= {"patches": [made / "patches", made / "ported"], **changed}
    return evaluate.run(out=out / "scores.json", samples=out / "samples.parquet", **arguments)


def written(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("scores.json", "samples.parquet")]


def test_the_second_time_nothing_is_scored_and_the_files_are_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(made, tmp_path / "first")
    # issue 8, item 2: adapters without a record next to a recorded model, every task on each
    arms = ("base", "patched", "patched", "ported")
    assert [(s.arm, s.task) for s in first.scores] == [(arm, task) for arm in arms for task in TASKS]
    assert first.cached == 0
    uncached = score(made, tmp_path / "uncached", cache=False)
    assert (uncached.cached, uncached.scores) == (0, first.scores)

    monkeypatch.setattr(evaluation, "Harness", None)
    again = score(made, tmp_path / "again")
    assert (again.cached, again.scores) == (8, first.scores)
    assert written(tmp_path / "first") == written(tmp_path / "uncached") == written(tmp_path / "again")


@pytest.mark.parametrize("what", ["out", "samples"])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_scored(
    made: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.Scoring, "scores", lambda *_, **__: pytest.fail("scored"))
    place = {"out": tmp_path / "scores.json", what: tmp_path}
    with pytest.raises(OutputError, match="found a directory"):
        evaluate.run(model=made / "base", tasks=TASKS, params=PARAMS, data=made / "data", **place)


def test_samples_hold_every_filter_s_answer(made: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    score(made, tmp_path, patches=[made / "ported"])
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    sums = [row for row in rows if (row["arm"], row["task"]) == ("base", "gsm8k")]
    assert [row["doc_id"] for row in sums] == list(range(6))
    assert {name for row in sums for name, _ in row["answers"]} == {"strict-match", "flexible-extract"}
    assert {name for row in sums for name, _ in row["metrics"]} == {
        "exact_match,strict-match", "exact_match,flexible-extract",
    }  # fmt: skip
    chosen = [row for row in rows if (row["arm"], row["task"]) == ("ported", "sst2")]
    tree = json.loads((tmp_path / "scores.json").read_text())
    accuracy = next(r["metrics"]["acc,none"] for r in tree["results"] if (r["arm"], r["task"]) == ("ported", "sst2"))
    assert sum(row["correct"] for row in chosen) / len(chosen) == pytest.approx(accuracy)
    for row in chosen:
        assert max(range(2), key=row["loglikelihoods"].__getitem__) == int(row["answer"])
        assert row["correct"] is (row["answer"] == row["target"])


def changes(made: Path) -> dict[str, tuple[Path, str]]:
    """What may change next to parameters: a file, and which of base, adapter and ported do not depend on it."""
    return {
        "data": (made / "data/sst2/validation.parquet", ""),
        "tokenizer": (made / "base/tokenizer.json", "ported"),
        "config": (made / "base/generation_config.json", "ported"),
        "adapter": (made / "patches/2/adapter_config.json", "base, ported"),
    }


@pytest.mark.parametrize("what", ["data", "tokenizer", "config", "adapter"])
def test_what_changed_is_scored_again(made: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    document = ScoredDocument(doc_id=0, score=1.0, answer="1", target="1")
    scored = ScoredTask(task="sst2", split="validation", metrics={"acc,none": 1.0}, documents=(document,))

    def pretend(_: evaluate.Scoring, planned: dict[int, PlannedScore]) -> Any:
        computed.extend(one.patch.name if one.patch else "base" for one in planned.values())
        return ((i, dataclasses.replace(scored, task=one.task)) for i, one in planned.items())

    few: dict[str, Any] = {"tasks": ["sst2"], "patches": [made / "patches/2", made / "ported"]}
    monkeypatch.setattr(evaluate.Scoring, "compute", pretend)
    score(made, tmp_path, **few)
    assert computed == ["base", "2", "ported"]
    score(made, tmp_path, **few)
    assert computed == ["base", "2", "ported"]
    path, same = changes(made)[what]
    text = path.read_bytes()
    try:
        path.write_bytes(text + b" ")
        computed.clear()
        score(made, tmp_path, **few)
    finally:
        path.write_bytes(text)
    assert computed == [name for name in ("base", "2", "ported") if name not in same]


@pytest.mark.parametrize(
    ("change", "cached"),
    [({"batch_size": 0}, 1), ({"threads": 2}, 1), ({"limit": 5}, 0), ({"num_fewshot": 1}, 0), ({"seed": 1}, 0)],
)
def test_parameters_that_matter(made: Path, tmp_path: Path, change: dict[str, int], cached: int) -> None:
    few: dict[str, Any] = {"tasks": ["sst2"], "patches": []}
    score(made, tmp_path, **few)
    again = score(made, tmp_path, params=dataclasses.replace(PARAMS, **change), **few)
    assert again.cached == cached


def test_a_file_changed_while_it_was_scored_is_not_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: dict[str, Any] = {"tasks": ["sst2"], "patches": []}
    inner = evaluation.Harness.score

    def slow(self: evaluation.Harness, task: Any, **settings: Any) -> Any:
        (made / "base" / "tokenizer.json").touch()
        return inner(self, task, **settings)

    with monkeypatch.context() as changed:
        changed.setattr(evaluation.Harness, "score", slow)
        score(made, tmp_path, **few)
    assert score(made, tmp_path, **few).cached == 0
    assert score(made, tmp_path, **few).cached == 1


def test_merged_checkpoints_are_loaded_one_at_a_time(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Any]] = []
    inner = evaluation.load_model

    def counting(*rest: Any, **settings: Any) -> Any:
        assert all(one() is None for one in alive), "the model before is still in memory"
        model, words = inner(*rest, **settings)
        alive.append(weakref.ref(model))
        return model, words

    monkeypatch.setattr(evaluation, "load_model", counting)
    gc.disable()  # nothing is freed by chance
    try:
        score(made, tmp_path, tasks=["sst2"], cache=False)
    finally:
        gc.enable()
    assert len(alive) == 2, "the base once, for itself and its adapters, and the ported checkpoint"


def test_a_cached_score_costs_no_heavy_import(made: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"tasks": ["sst2"], "patches": [made / "ported"]}
    score(made, tmp_path, **few)
    script = f"""
import sys
from pathlib import Path
from portllm.params import EvaluateParams
from portllm.verbs import evaluate
made, out = Path({str(made)!r}), Path({str(tmp_path)!r})
result = evaluate.run(model=made / "base", tasks=["sst2"], patches=[made / "ported"], data=made / "data",
                      out=out / "again.json", params=EvaluateParams())
heavy = {{"torch", "transformers", "lm_eval", "peft", "datasets"}} & set(sys.modules)
sys.exit(str((result.cached, heavy)) if heavy or result.cached != 2 else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "scores.json").read_bytes()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(made: Path, tmp_path: Path) -> None:
    score(made, tmp_path, cache=False, params=dataclasses.replace(PARAMS, batch_size=0))
    out = ["--out", str(tmp_path / "two/scores.json"), "--samples", str(tmp_path / "two/samples.parquet")]
    patches = [word for name in ("patches", "ported") for word in ("--patch", str(made / name))]
    command = [
        "evaluate",
        str(made / "base"),
        *patches,
        "--tasks",
        ",".join(TASKS),
        "--data",
        str(made / "data"),
        *out,
    ]
    launch = ["--launch", str(ROOT / "configs/accelerate/cpu-2.yaml"), "--threads", "1", "--batch-size", "0", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "portllm", "--no-track", *command, *launch],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["results"]) == 8, "one process answers"
    assert "0/8 from the cache" in done.stderr
    assert written(tmp_path / "two") == written(tmp_path)


def test_an_adapter_named_as_in_memory_is_refused_before_anything_is_scored(made: Path, tmp_path: Path) -> None:
    """issue 8, item 13: PEFT passes such tensors over, and the bare base would be scored as the patch."""
    import shutil

    from safetensors.torch import load_file, save_file

    patch = tmp_path / "named"
    shutil.copytree(made / "patches" / "2", patch)
    weights = patch / "adapter_model.safetensors"
    save_file({k.replace(".weight", ".default.weight"): v for k, v in load_file(weights).items()}, weights)
    with pytest.raises(PatchError, match=r"tensor names carry an adapter's name \(default\)"):
        score(made, tmp_path, patches=[patch])
    assert not (tmp_path / "scores.json").exists()


def test_samples_and_results_tell_patches_of_one_name_apart(made: Path, tmp_path: Path) -> None:
    """issue 8, item 4."""
    import shutil

    import pyarrow.parquet as pq

    places = [tmp_path / folder / "same" for folder in "AB"]
    for place, alpha in zip(places, ("2", "200"), strict=True):
        shutil.copytree(made / "patches" / alpha, place)
    result = score(made, tmp_path, tasks=["sst2"], patches=[*places, places[0]])
    assert [s.patch for s in result.scores] == [None, "A/same", "B/same"]
    assert [row["patch"] for row in json.loads((tmp_path / "scores.json").read_text())["results"]][1:] == [
        "A/same", "B/same",
    ]  # fmt: skip
    assert all(name in line for name, line in zip(("base", "A/same", "B/same"), result.lines(), strict=True))
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    keys = [(row["task"], row["patch"], row["patch_fingerprint"], row["doc_id"]) for row in rows]
    assert len(set(keys)) == len(keys) == 3 * 40
    assert {(s.patch, s.patch_fingerprint) for s in result.scores} == {key[1:3] for key in keys}


def test_every_score_has_a_name_of_its_own_in_the_tracker(made: Path, tmp_path: Path) -> None:
    """issue 8, item 4: two patches of one arm and task were one metric in MLflow, too."""
    from portllm.lineage import of_evaluation

    result = score(made, tmp_path, tasks=["sst2"])
    names = of_evaluation(result, tmp_path / "scores.json")["metrics"]
    assert len(names) == sum(len(s.metrics) for s in result.scores)
    assert {"sst2/base/bare/acc,none", "sst2/ported/sst2/acc,none", "sst2/patched/bare/200/acc,none"} <= set(names)


def test_prompts_longer_than_the_context_are_counted_noted_and_in_the_results(made: Path, tmp_path: Path) -> None:
    """issue 8, item 5: they lost their beginning without a word, from the cache as well."""
    few: dict[str, Any] = {"tasks": ["sst2"], "patches": [made / "patches/2"]}
    many = dataclasses.replace(PARAMS, num_fewshot=39, limit=3)
    for cached in (0, 2):
        notes: list[str] = []
        result = score(made, tmp_path, params=many, on_note=notes.append, **few)
        assert (result.cached, [s.truncated for s in result.scores]) == (cached, [3, 3])
        assert [note.partition(";")[0] for note in notes] == [
            "sst2 on the base: 3 of 3 prompts are longer than the model's context",
            "sst2 on 2: 3 of 3 prompts are longer than the model's context",
        ]
        rows = json.loads((tmp_path / "scores.json").read_text())["results"]
        assert [row["truncated"] for row in rows] == [3, 3]
    score(made, tmp_path, **few)
    assert all("truncated" not in row for row in json.loads((tmp_path / "scores.json").read_text())["results"])


@pytest.mark.parametrize("what", ["shape", "values"])
def test_a_patch_that_cannot_be_scored_is_refused_before_anything_is_loaded(
    made: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 8, items 1 and 15."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    shutil.copytree(made / "patches" / "2", bad)
    tensors = load_file(bad / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.ones(99, 2) if what == "shape" else torch.full_like(tensors[name], torch.nan)
    save_file(tensors, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(PatchError, match="99" if what == "shape" else "NaN"):
        score(made, tmp_path / "out", patches=[bad], cache=False)
    assert not (tmp_path / "out").exists()


def test_a_cache_that_cannot_be_written_is_noted_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 8, item 16."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    notes: list[str] = []
    result = score(made, tmp_path, on_note=notes.append, patches=[made / "ported"])
    assert (result.cached, len(result.scores)) == (0, 4)
    (note,) = [note for note in notes if "cache of scores" in note]
    assert note.endswith("the scores are computed again next time")
