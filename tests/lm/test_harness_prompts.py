"""What a patch is trained on is what the harness asks: token for token, for every task of the world."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from portllm.lm.data import encoding, prompts, tasks
from portllm.lm.learning import llama
from portllm.lm.scoring import questions
from portllm.params import ArchitectureParams, EvaluateParams
from portllm.world import datasets, tokenizer


@pytest.mark.slow
def test_training_prompts_equal_evaluation_prompts_token_for_token(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {task: datasets.rows(task, seed=0, train_rows=4, test_rows=12)["test"] for task in datasets.TASKS}
    specs = []
    for task, told in rows.items():
        pq.write_table(pa.Table.from_pylist(told), tmp_path / f"{task}.parquet")
        config = prompts.load_task(datasets.task_file(task))
        specs.append(tasks.on_files(config, dict.fromkeys(datasets.SPLITS, tmp_path / f"{task}.parquet"), name=task))
    words = tokenizer.build()
    model = llama.new_llama(words, ArchitectureParams(hidden_size=16, intermediate_size=16, layers=1, heads=1), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        from lm_eval.models.huggingface import HFLM

        loaded = questions.load_tasks(specs, EvaluateParams())
        harness = HFLM(pretrained=model, tokenizer=words)
        for task, told in rows.items():
            loaded[task].build_all_requests(limit=None, rank=0, world_size=1)
            asked = {(request.doc_id, request.idx): request.args for request in loaded[task].instances}
            trained = encoding.encode(words, prompts.Prompts.load(datasets.task_file(task)).pairs(told), 128).examples
            for number, (row, example) in enumerate(zip(told, trained, strict=True)):
                label = int(row.get("label", row.get("answer"))) if task != "world_gsm8k" else 0
                context, said = asked[number, label]
                if task == "world_gsm8k":
                    said = " " + loaded[task].doc_to_target(row)
                given, answer = harness._encode_pair(context, said)
                assert example["input_ids"] == [*given, *answer, words.eos_token_id]
                assert example["labels"][: len(given)] == [encoding.IGNORED] * len(given)
                assert example["labels"][len(given)] == answer[0]
