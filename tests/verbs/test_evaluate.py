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
    told: dict[str, Any] = {"model": made / "base", "tasks": TASKS, "params": PARAMS, "data": made / "data"}
    told |= {"patches": [made / "patches", made / "ported"], **changed}
    return evaluate.run(out=out / "scores.json", samples=out / "samples.parquet", **told)


def written(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("scores.json", "samples.parquet")]


def test_the_second_time_nothing_is_scored_and_the_files_are_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(made, tmp_path / "first")
    # both adapters are of no known task: asked all; the ported one is for sst2, which the base is asked as well
    assert [(c.arm, c.task) for c in first.cells] == [
        ("base", "sst2"), ("base", "gsm8k"), ("patched", "gsm8k"), ("patched", "gsm8k"), ("ported", "sst2"),
        ("ported", "gsm8k"),
    ]  # fmt: skip
    assert first.known == 0
    uncached = score(made, tmp_path / "uncached", cache=False)
    assert (uncached.known, uncached.cells) == (0, first.cells)

    monkeypatch.setattr(evaluation, "Harness", None)
    again = score(made, tmp_path / "again")
    assert (again.known, again.cells) == (6, first.cells)
    assert written(tmp_path / "first") == written(tmp_path / "uncached") == written(tmp_path / "again")


@pytest.mark.parametrize("what", ["out", "samples"])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_scored(
    made: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_scored", lambda *_, **__: pytest.fail("scored"))
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
    told = next(r["metrics"]["acc,none"] for r in tree["results"] if (r["arm"], r["task"]) == ("ported", "sst2"))
    assert sum(row["correct"] for row in chosen) / len(chosen) == pytest.approx(told)
    for row in chosen:
        assert max(range(2), key=row["loglikelihoods"].__getitem__) == int(row["answer"])
        assert row["correct"] is (row["answer"] == row["target"])


def changes(made: Path) -> dict[str, tuple[Path, str]]:
    """What may change beside parameters: a file, and how many of base, adapter and ported do not depend on it."""
    return {
        "data": (made / "data/sst2/validation.parquet", ""),
        "tokenizer": (made / "base/tokenizer.json", "ported"),
        "config": (made / "base/generation_config.json", "ported"),
        "adapter": (made / "patches/2/adapter_config.json", "base, ported"),
    }


@pytest.mark.parametrize("what", ["data", "tokenizer", "config", "adapter"])
def test_what_changed_is_scored_again(made: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def pretend(_: evaluate.Scoring, rows: dict[int, evaluate.Row]) -> Any:
        asked.extend((r.candidate.arm.replace("patched", "adapter") if r.candidate else "base") for r in rows.values())
        return ((i, dataclasses.replace(scored, task=row.task)) for i, row in rows.items())

    few = {"tasks": ["sst2"], "patches": [made / "patches/2", made / "ported"]}
    monkeypatch.setattr(evaluate, "_told", lambda path, _: ("ported" if path.name == "ported" else "patched", None))
    scored = evaluation.Harness(made / "base", PARAMS).score(
        evaluation.load_tasks([evaluate_spec(made)], PARAMS)["sst2"]
    )
    monkeypatch.setattr(evaluate.Scoring, "score", pretend)
    score(made, tmp_path, **few)
    assert asked == ["base", "adapter", "ported"]
    score(made, tmp_path, **few)
    assert asked == ["base", "adapter", "ported"]
    path, same = changes(made)[what]
    text = path.read_bytes()
    try:
        path.write_bytes(text + b" ")
        asked.clear()
        score(made, tmp_path, **few)
    finally:
        path.write_bytes(text)
    assert asked == [arm for arm in ("base", "adapter", "ported") if arm not in same]


def evaluate_spec(made: Path) -> Any:
    from portllm.lm.data import tasks

    return tasks.spec("sst2", made / "data")


@pytest.mark.parametrize(
    ("change", "known"),
    [({"batch_size": 0}, 1), ({"threads": 2}, 1), ({"limit": 5}, 0), ({"num_fewshot": 1}, 0), ({"seed": 1}, 0)],
)
def test_parameters_that_matter(made: Path, tmp_path: Path, change: dict[str, int], known: int) -> None:
    few: dict[str, Any] = {"tasks": ["sst2"], "patches": []}
    score(made, tmp_path, **few)
    again = score(made, tmp_path, params=dataclasses.replace(PARAMS, **change), **few)
    assert again.known == known


def test_a_file_changed_while_it_was_scored_is_not_remembered(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: dict[str, Any] = {"tasks": ["sst2"], "patches": []}
    inner = evaluation.Harness.score

    def slow(self: evaluation.Harness, task: Any, **told: Any) -> Any:
        (made / "base" / "tokenizer.json").touch()
        return inner(self, task, **told)

    with monkeypatch.context() as changed:
        changed.setattr(evaluation.Harness, "score", slow)
        score(made, tmp_path, **few)
    assert score(made, tmp_path, **few).known == 0
    assert score(made, tmp_path, **few).known == 1


def test_merged_checkpoints_are_loaded_one_at_a_time(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Any]] = []
    inner = evaluation.load_model

    def counting(*rest: Any, **told: Any) -> Any:
        assert all(one() is None for one in alive), "what was scored before is still in memory"
        model, words = inner(*rest, **told)
        alive.append(weakref.ref(model))
        return model, words

    monkeypatch.setattr(evaluation, "load_model", counting)
    gc.disable()  # nothing is freed by chance
    try:
        score(made, tmp_path, tasks=["sst2"], cache=False)
    finally:
        gc.enable()
    assert len(alive) == 2, "the base once, for itself and its adapters, and the ported checkpoint"


def test_what_is_known_costs_no_heavy_import(made: Path, tmp_path: Path) -> None:
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
sys.exit(str((result.known, heavy)) if heavy or result.known != 2 else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "scores.json").read_bytes()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(made: Path, tmp_path: Path) -> None:
    score(made, tmp_path, cache=False, params=dataclasses.replace(PARAMS, batch_size=0))
    out = ["--out", str(tmp_path / "two/scores.json"), "--samples", str(tmp_path / "two/samples.parquet")]
    patches = [word for name in ("patches", "ported") for word in ("--patch", str(made / name))]
    command = ["evaluate", str(made / "base"), *patches, "--tasks", ",".join(TASKS), "--data", str(made / "data"), *out]
    launch = ["--launch", str(ROOT / "configs/accelerate/cpu-2.yaml"), "--threads", "1", "--batch-size", "0", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "portllm", "--no-track", *command, *launch],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["results"]) == 6, "one process speaks"
    assert "0/6 from the cache" in done.stderr
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
