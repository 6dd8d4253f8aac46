"""params.yaml is read whole or refused, naming the key and the nearest known one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from portllm import params
from portllm.errors import ParamsError

ROOT = Path(__file__).parent.parent


def load(tmp_path: Path, text: str) -> params.Params:
    file = tmp_path / "params.yaml"
    file.write_text(text, encoding="utf-8")
    return params.load(file)


def test_the_defaults_are_the_papers() -> None:
    train = params.load(None).train
    assert (train.lora.r, train.lora.alpha, train.lora.dropout) == (8, 16, 0.1)
    assert train.lora.target_modules == params.ALL_LINEARS
    assert (train.optim.learning_rate, train.optim.epochs, train.optim.batch_size) == (1e-4, 10.0, 4)
    assert (train.max_length, train.seed) == (256, 1234)


def test_the_repositorys_own_file_is_read() -> None:
    whole = params.load(ROOT / "params.yaml")
    assert whole.releases[0] == "v0"
    assert len(whole.tasks) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {lora: {rank: 4}}", "unknown key train.lora.rank; did you mean train.lora.r?"),
        ("trian: {}", "unknown key trian; did you mean train?"),
        ("evaluate: {batchsize: 3}", "did you mean evaluate.batch_size?"),
        ("train: {lora: {r: eight}}", "train.lora.r must be a int, found 'eight'"),
        ("train: {lora: {r: 4.5}}", "train.lora.r must be a int, found 4.5"),
        ("train: {lora: {r: true}}", "train.lora.r must be a int, found True"),
        ("port: {as: both}", "port.as must be one of merged, adapter, found 'both'"),
        ("train: 3", "train must be a mapping"),
        ("- a", "the top level must be a mapping"),
        ("tasks: boolq", "tasks must be a list"),
        ("tasks: [1]", "tasks[0] must be a str"),
        ("train: {lora: {use_rslora: 1}}", "train.lora.use_rslora must be a bool"),
        ("releases: [v0, v1]", "evolve.releases has no recipe for it"),
        ("releases: [v0, v1]\nevolve: {releases: {v1: {}}}", "evolve.releases.v1 lacks base"),
        ("releases: [v0, v1]\nevolve: {releases: {v1: {base: v9}}}", "expected one of v0, v1"),
        ("a: [", "not valid YAML"),
        ("train: {optim: {gradient_accumulation: 0}}", "optim.gradient_accumulation is 0; expected 1 or more"),
        ("train: {optim: {logging_steps: 0}}", "optim.logging_steps is 0; expected 1 or more"),
        ("fetch: {optim: {batch_size: -4}}", "optim.batch_size is -4; expected 1 or more"),
        ("train: {optim: {threads: -1}}", "optim.threads is -1; expected 0 or more"),
        ("train: {optim: {save_steps: -1}}", "optim.save_steps is -1"),
        ("train: {optim: {max_steps: -1}}", "optim.max_steps is -1"),
        ("train: {optim: {learning_rate: .nan}}", "optim.learning_rate is nan"),
        ("train: {optim: {epochs: 0}}", "optim.epochs and optim.max_steps are both 0"),
        ("train: {optim: {warmup_ratio: 1}}", "optim.warmup_ratio is 1.0; expected a share from 0, below 1"),
        ("train: {optim: {decay_ratio: 1.1}}", "optim.decay_ratio is 1.1; expected a share from 0 to 1"),
        ("train: {lora: {r: 0}}", "lora.r is 0; expected 1 or more"),
        ("evaluate: {batch_size: -1}", "evaluate.batch_size is -1; expected 0 or more"),
        ("evaluate: {threads: -1}", "evaluate.threads is -1"),
        ("evaluate: {num_fewshot: -2}", "evaluate.num_fewshot is -2; expected a number of examples, or -1"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_without_a_dot_is_still_a_number(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-4 as text
    assert load(tmp_path, "train: {optim: {learning_rate: 1e-4, epochs: 3}}").train.optim.learning_rate == 1e-4


def test_what_stands_at_the_edge_is_allowed() -> None:
    params.OptimParams(epochs=0, max_steps=1, learning_rate=0, decay_ratio=1)
    params.OptimParams(epochs=0.5, save_steps=0, threads=0)
    params.EvaluateParams(batch_size=0, num_fewshot=-1)


def test_a_missing_file_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="--params"):
        params.load(tmp_path / "none.yaml")


def test_a_tasks_overrides_replace_only_what_they_name(tmp_path: Path) -> None:
    text = "train: {lora: {r: 4, alpha: 3}, per_task: {sums: {lora: {alpha: 7}, optim: {max_steps: 9}}}}"
    train = load(tmp_path, text).train
    sums = train.for_task("sums")
    assert (sums.lora.r, sums.lora.alpha, sums.optim.max_steps) == (4, 7, 9)
    assert train.for_task("other") is train
    assert dataclasses.replace(sums, lora=train.lora, optim=train.optim) == train


def test_a_wrong_override_names_its_place(tmp_path: Path) -> None:
    train = load(tmp_path, "train: {per_task: {sums: {lora: {rr: 1}}}}").train
    with pytest.raises(
        ParamsError, match=r"train\.per_task\.sums\.lora\.rr; did you mean train\.per_task\.sums\.lora\.r\?"
    ):
        train.for_task("sums")


def test_a_section_as_a_tree_reads_back_as_itself() -> None:
    section = params.TrainParams(seed=3)
    assert params.parse(params.TrainParams, params.as_tree(section), where="train", source="test") == section
