"""Tasks by name: what is trained on is what the harness asks, and the answer is the one it calls right."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import DataError, EvaluationError
from portllm.lm.data import asking, own, prompts, stock, tables, tasks
from portllm.lm.data.encoding import Generated
from portllm.world import datasets

Rows = Sequence[Mapping[str, Any]]
CHOICES = {"text": ["red", "green", "blue"], "label": ["A", "B", "C"]}
# tasks of the harness of every form, on rows of our own in the columns of their data
HARNESS: dict[str, Rows] = {
    "cola": [{"sentence": "the cat sat", "label": 1, "idx": 0}, {"sentence": "cat the", "label": 0, "idx": 1}],
    "qnli": [{"question": "who?", "sentence": "he did", "label": 1, "idx": 0}],
    "winogrande": [{"sentence": "a cat met a dog and _ ran off", "option1": "cat", "option2": "dog", "answer": "2"}],
    "arc_easy": [
        {"question": "what colour is grass?", "choices": CHOICES, "answerKey": "B"},
        {"question": "and blood?", "choices": CHOICES, "answerKey": "A"},
    ],
    "openbookqa": [{"question_stem": "the sky is", "choices": CHOICES, "answerKey": "C"}],
    "commonsense_qa": [
        {
            "question": "where do birds live?",
            "choices": {"text": ["sea", "tree", "car", "pot", "sun"], "label": list("ABCDE")},
            "answerKey": "B",
        }
    ],
    "copa": [
        {"premise": "it rained", "choice1": "it was dry", "choice2": "it was wet", "question": "effect", "label": 1}
    ],
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "Cooking",
            "ctx_a": "a man cooks.",
            "ctx_b": "he",
            "ctx": "a man cooks. he",
            "endings": ["eats.", "flies.", "sings.", "swims."],
            "source_id": "x",
            "split": "train",
            "split_type": "indomain",
            "label": "2",
        }
    ],  # fmt: skip
    "piqa": [{"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0}],
    "gsm8k": [{"question": "2 and 2?", "answer": "It is 2+2=<<2+2=4>>4.\n#### 4"}],
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        yield


def lay(data: Path, name: str, rows: Rows) -> Path:
    """DATA/<name> with the same rows in every split the task names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data / name).mkdir(parents=True)
    for split in set(stock.splits(stock.definition(name)).values()):
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), data / name / f"{split}.parquet")
    return data


def asked(task: Any) -> dict[int, list[Any]]:
    """The harness's own requests on the split it evaluates, by document, without examples."""
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    found: dict[int, list[Any]] = {}
    for request in task.instances:
        found.setdefault(request.doc_id, []).append(request)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", HARNESS)
def test_a_pair_is_a_request_of_the_harness_and_it_calls_the_answer_right(tmp_path: Path, name: str) -> None:
    data = lay(tmp_path, name, HARNESS[name])
    task = asking.build(tasks.spec(name, data), name=name)
    requests, pairs = asked(task), tasks.training_pairs(name, data)
    assert len(pairs) == len(requests) == len(HARNESS[name])
    for number, pair in enumerate(pairs):
        document = list(task.eval_docs)[number]
        if task.OUTPUT_TYPE == "generate_until":
            ((context, _),) = (request.args for request in requests[number])
            assert isinstance(pair, Generated)
            assert pair[0] == context
            for request in requests[number]:
                request.resps = [pair[1]]
            task._instances = requests[number]
            task.apply_filters()
            for strainer in requests[number][0].filtered_resps.values():
                assert task.process_results(document, [strainer])["exact_match"] == 1.0
        else:
            chosen = [request.args for request in requests[number]].index(pair)
            answered = [(0.0 if i == chosen else -9.0, i == chosen) for i in range(len(requests[number]))]
            result = task.process_results(document, answered)
            assert result.get("acc", 1.0) == 1.0
            assert len(set(result.get("mcc", (0, 0)))) == 1, "the right label and the one found"
            assert {"acc", "mcc"} & set(result)


@pytest.mark.parametrize("task", datasets.TASKS)
def test_the_worlds_tasks_keep_to_their_templates(tmp_path: Path, task: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = datasets.rows(task, seed=0, train_rows=6, test_rows=4)["train"]
    (tmp_path / task).mkdir()
    for split in datasets.SPLITS:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / task / f"{split}.parquet")
    assert tasks.training_pairs(task, tmp_path) == prompts.Prompts.load(datasets.task_file(task)).pairs(rows)
    assert tasks.spec(task, tmp_path)["dataset_kwargs"]["data_files"]["train"].endswith(f"{task}/train.parquet")
    assert list(tasks.digests(task, tmp_path, "training")) == [f"{task}/train.parquet"]
    assert list(tasks.digests(task, tmp_path, "evaluation")) == [f"{task}/test.parquet"]
    assert len(tasks.digests(task, tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        (
            "qnli",
            {"question": "q", "sentence": "s", "label": -1, "idx": 0},
            "label -1 (-1 hides a label) is out of range",
        ),
        ("qnli", {"question": "q", "sentence": "s", "label": 2, "idx": 0}, "row 1 of train: label 2 is out of range"),
        ("arc_easy", {"question": "q", "choices": CHOICES, "answerKey": "D"}, "does not fit"),
        ("nq_open", {"question": "q", "answer": ["a", "b"]}, "has 2 right answers, expected one"),
    ],
)
def test_a_row_without_one_right_answer_is_refused_by_number(
    tmp_path: Path, name: str, row: dict[str, Any], says: str
) -> None:
    good = HARNESS[name][0] if name in HARNESS else row
    data = lay(tmp_path, name, [good, row])
    with pytest.raises(DataError) as error:
        tasks.training_pairs(name, data)
    assert says in str(error.value)


@pytest.mark.slow
def test_a_row_in_other_columns_is_refused_by_name(tmp_path: Path) -> None:
    data = lay(tmp_path, "qnli", [{"question": "q", "text": "s", "label": 0}])
    with pytest.raises(DataError, match=r"qnli.*'sentence' is undefined"):
        tasks.training_pairs("qnli", data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wikitext", "no answer to train on"),
        ("lambada_openai", "has no training split"),
        ("mmlu", "no such task"),
        ("sst3", "did you mean sst2?"),
        ("squadv2", "found one defined in code"),
    ],
)
def test_a_task_that_cannot_be_trained_on_is_refused(tmp_path: Path, name: str, says: str) -> None:
    if name == "wikitext":
        lay(tmp_path, name, [{"page": "a text"}])
    with pytest.raises(EvaluationError, match=says):
        tasks.training_pairs(name, tmp_path)


def test_without_files_the_harness_asks_the_hub_under_the_bare_name(tmp_path: Path) -> None:
    assert tasks.spec("boolq", None) == "boolq"
    assert tasks.spec("boolq", tmp_path) == "boolq"
    with pytest.raises(DataError, match="no such folder"):
        tasks.spec("boolq", tmp_path / "slip")
    with pytest.raises(DataError, match="make it with `portllm prepare cola`"):
        tasks.training_pairs("cola", tmp_path)


@pytest.mark.slow
def test_with_no_training_rows_the_harness_asks_without_examples_and_refuses_to_give_any(tmp_path: Path) -> None:
    data = lay(tmp_path, "cola", HARNESS["cola"])
    (data / "cola" / "train.parquet").unlink()
    task = asking.build(tasks.spec("cola", data), name="cola")
    assert len(asked(task)) == 2
    task.set_config("num_fewshot", 1)
    with pytest.raises(AssertionError, match="no documents"):
        task.build_all_requests()
    (data / "cola" / "validation.parquet").unlink()
    with pytest.raises(DataError, match=r"has no validation\.parquet"):
        tasks.spec("cola", data)


@pytest.mark.slow
def test_lines_of_json_serve_as_well_as_parquet(tmp_path: Path) -> None:
    data, rows = lay(tmp_path / "a", "qnli", HARNESS["qnli"]), tmp_path / "b" / "qnli"
    rows.mkdir(parents=True)
    for split in ("train", "validation"):
        (rows / f"{split}.jsonl").write_text(json.dumps(HARNESS["qnli"][0]) + "\n", encoding="utf-8")
    assert tasks.training_pairs("qnli", tmp_path / "b") == tasks.training_pairs("qnli", data)
    both = [asked(asking.build(tasks.spec("qnli", one), name="qnli"))[0] for one in (data, tmp_path / "b")]
    assert [request.args for request in both[0]] == [request.args for request in both[1]]
    (rows / "train.jsonl").rename(rows / "validation.parquet")
    (rows / "train.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match="several formats"):
        tasks.spec("qnli", tmp_path / "b")


@pytest.mark.slow
def test_googles_boolq_is_asked_as_super_glues(tmp_path: Path) -> None:
    row = {"question": "is it", "passage": "It is.", "answer": True}
    data = lay(tmp_path, "boolq", [row, {**row, "answer": False}])
    pairs = tasks.training_pairs("boolq", data)
    assert pairs == [("It is.\nQuestion: is it?\nAnswer:", said) for said in (" yes", " no")]
    task = asking.build(tasks.spec("boolq", data), name="boolq")
    assert [r.args for r in asked(task)[0]] == [pairs[1], pairs[0]]
    assert [task.doc_to_target(row) for row in task.eval_docs] == [1, 0]


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Tokenizer:
    """What a chat task needs of a tokenizer."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: list[Any], *, tokenize: bool, add_generation_prompt: bool) -> str:
        from jinja2 import Environment

        made = Environment(trim_blocks=True, autoescape=False).from_string(str(self.chat_template))  # noqa: S701
        return made.render(messages=messages, add_generation_prompt=add_generation_prompt)


def own_task(data: Path, rows: Rows, **definition: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data / "mine").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), data / "mine" / f"{split}.parquet")
    made = own.Definition(**{"name": "mine", "kind": "loglikelihood", "splits": ("train", "test"), **definition})
    (data / "mine" / own.FILE).write_text(made.text(), encoding="utf-8")
    return data


PLAIN = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "digits: ", "completion": "[1, 2]"}]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_own_rows_are_asked_as_they_are(tmp_path: Path, kind: str) -> None:
    data = own_task(tmp_path, PLAIN, kind=kind, answers=[row["completion"] for row in PLAIN])
    pairs = tasks.training_pairs("mine", data)
    assert [tuple(pair) for pair in pairs] == [(row["prompt"], row["completion"]) for row in PLAIN]
    task = asking.build(tasks.spec("mine", data), name="mine")
    requests = asked(task)
    assert [requests[i][0].args[0] for i in range(2)] == [row["prompt"] for row in PLAIN]
    if kind == "loglikelihood":
        assert [requests[i][0].args for i in range(2)] == pairs
        assert task.process_results(PLAIN[0], [(-0.5, True)]) == {"acc": 1, "perplexity": -0.5}
    else:
        assert requests[0][0].args[1]["max_gen_toks"] == 14
        assert task.process_results(PLAIN[1], ["[1, 2] "]) == {"exact_match": 1.0}
        assert task.process_results(PLAIN[1], ["[1, 2"]) == {"exact_match": 0.0}


@pytest.mark.slow
def test_own_rows_may_be_a_choice(tmp_path: Path) -> None:
    rows = [{"prompt": "good:", "completion": " yes", "label": 1}, {"prompt": "bad:", "completion": " no", "label": 0}]
    data = own_task(tmp_path, rows, kind="multiple_choice", choices=[" no", " yes"])
    assert tasks.training_pairs("mine", data) == [("good:", " yes"), ("bad:", " no")]
    requests = asked(asking.build(tasks.spec("mine", data), name="mine"))
    assert [r.args for r in requests[0]] == [("good:", " no"), ("good:", " yes")]


@pytest.mark.slow
def test_a_chat_is_rendered_with_the_models_own_template(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello [1]"}]
    data = own_task(tmp_path, [{"messages": talk}], chat=True)
    words: Any = Tokenizer(CHAT)
    pair = ("<user>hi<end>\n<assistant>", "hello [1]<end>")
    assert tasks.training_pairs("mine", data, words) == [pair]
    assert [r.args for r in asked(asking.build(tasks.spec("mine", data, words), name="mine"))[0]] == [pair]
    assert own.exact_match({"messages": talk}, ["hello [1]"]) == {"exact_match": 1.0}
    with pytest.raises(EvaluationError, match="has no chat template"):
        tasks.spec("mine", data, Tokenizer(None))  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="needs a model's chat template"):
        tasks.training_pairs("mine", data)
    odd: Any = Tokenizer("{{ messages|length }}")
    with pytest.raises(DataError, match="renders the question differently"):
        tasks.training_pairs("mine", data, odd)
    strict: Any = Tokenizer("{{ raise_it() }}")
    with pytest.raises(DataError, match="refuses it"):
        tasks.training_pairs("mine", data, strict)


def test_a_definition_is_yaml_that_the_harness_reads(tmp_path: Path) -> None:
    made = own.Definition(name="mine", kind="generate_until", splits=("train", "validation"), answers=["abc"])
    (tmp_path / own.FILE).write_text(made.text(), encoding="utf-8")
    config = own.load(tmp_path)
    assert (config["training_split"], config["validation_split"], config.get("test_split")) == (
        "train",
        "validation",
        None,
    )
    assert config["process_results"] is own.exact_match
    assert config["generation_kwargs"] == {"until": ["\n"], "do_sample": False, "max_gen_toks": 11}
    (tmp_path / own.FILE).write_text(dataclasses.replace(made, answers=["a\nb" * 999]).text(), encoding="utf-8")
    assert own.load(tmp_path)["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": 512}


@pytest.mark.slow
def test_the_list_says_what_the_harness_says() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    listed = {one.task: one for one in stock.listing()}
    assert len(listed) > 10_000
    for name in ("sst2", "gsm8k", "lambada_openai", "wikitext", "arc_challenge", "mmlu_anatomy", "hellaswag"):
        path = stock.find(name)
        assert path is not None
        config = load_yaml(path)
        assert listed[name].output_type == config.get("output_type", "generate_until")
        assert listed[name].trainable == bool(config.get("training_split"))


def changed_task(tmp_path: Path, text: str) -> Path:
    """DATA with a task of the user's own, whose definition has the field in `text`."""
    import yaml

    data = tmp_path / "data"
    (data / "mine").mkdir(parents=True)
    for split in ("train", "test"):
        tables.write(
            data / "mine" / f"{split}.parquet", tables.of_rows([{"prompt": "a", "completion": " b"}], where="")
        )
    shown = own.Definition(name="mine", kind="loglikelihood", splits=("train", "test")).text()
    kept = {field: value for field, value in yaml.safe_load(shown).items() if field != text.partition(":")[0]}
    (data / "mine" / own.FILE).write_text(f"{yaml.safe_dump(kept)}{text}\n", encoding="utf-8")
    return data


@pytest.mark.slow
@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target", "description"])
def test_a_template_runs_no_code(tmp_path: Path, field: str) -> None:
    data = changed_task(tmp_path, f"{field}: \"{{{{ cycler.__init__.__globals__.os.mkdir('{tmp_path}/ran') }}}}\"")
    with pytest.raises(DataError, match="unsafe"):
        tasks.training_pairs("mine", data)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("metric_list: [{metric: ./script.py, aggregation: mean}]", "not one of the harness's own"),
        ("metric_list: [{metric: acc, aggregation: mean, hf_evaluate: true}]", "not one of the harness's own"),
        ("use_prompt: 'a.yaml:b'", "has the field 'use_prompt'"),
        ("include: other.yaml", "has the field 'include'"),
        ("process_results: !function portllm.checkpoint.files.output.abandon", "is not portllm's own"),
        ("process_results: !function portllm.lm.data.own.Path", "is not a function for task files"),
    ],
)
def test_a_definition_that_would_load_code_is_refused(tmp_path: Path, text: str, says: str) -> None:
    data = changed_task(tmp_path, text)
    with pytest.raises(EvaluationError, match=says):
        asking.build(tasks.spec("mine", data), name="mine")


def prepared(name: str, folder: Path) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "train.parquet").write_bytes(b"")


def test_data_folder_without_data_takes_the_documented_one_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 8, item 14: `prepare --out data/tasks/NAME` and the documented next command, without --data."""
    monkeypatch.chdir(tmp_path)
    prepared("tickets", Path("data/tasks"))
    prepared("tickets", Path("data"))
    prepared("letters", Path("data"))
    Path("data/tasks/letters").mkdir()  # an empty folder does not hide the one with files
    assert tasks.data_folder("tickets", None) == tasks.training_folder("tickets", None) == Path("data/tasks")
    assert tasks.data_folder("letters", None) == tasks.training_folder("letters", None) == Path("data")
    assert tasks.data_folder("sst2", None) == Path("data/tasks")
    assert tasks.data_folder("tickets", Path("data")) == Path("data")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("sst2", None, r"sst2: no data found in data/tasks/sst2 and data/sst2; make it .* --out data/tasks/sst2`, or"),
        ("sst2", "mine", r"sst2: no data found in mine/sst2; make it with `portllm prepare sst2 --out mine/sst2`$"),
        ("world_boolq", None, r"no data found in data/tasks/world_boolq and data/world_boolq"),
        ("tickts", None, r"tickts: no such task .*; did you mean tickets\?"),
        ("lettrs", None, r"lettrs: no such task .*; did you mean letters\?"),
        ("world_bolq", None, r"did you mean world_boolq\?"),
        ("sst2", "mien", r"mien: no such folder; .*; did you mean mine\?"),
    ],
)
def test_training_folder_without_files_names_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: str | None, says: str
) -> None:
    """issue 8, item 14."""
    monkeypatch.chdir(tmp_path)
    prepared("tickets", Path("data/tasks"))
    prepared("letters", Path("data"))
    Path("mine").mkdir()
    with pytest.raises((DataError, EvaluationError), match=says):
        tasks.training_folder(name, None if data is None else Path(data))
