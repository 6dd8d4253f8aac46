"""Tracking: recorded runs lead back to every input and onward to every output; no tracker harms a stage."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import psutil
import pytest

from portllm.errors import TrackingError
from portllm.params import LoraParams
from portllm.tracking import Artifact, Dataset, VersionRequest, ancestry, descendants, lineage, registry, store, track
from portllm.tracking.messages import clean, flatten, in_alphabet, one_line, plain

pytestmark = [
    # MLflow supports pydantic 1 and 2, and Python 3.12 deprecates sqlite3's default adapters
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
    pytest.mark.xdist_group("timed"),
]

DATA = Artifact("dataset", "world_boolq/train.parquet", "da" * 32)
V0 = Artifact("checkpoint", "models/releases/v0", "b0" * 32)
V1 = Artifact("checkpoint", "models/releases/v1", "b1" * 32)
PATCH = Artifact("patch", "models/patches/v0/world_boolq", "fa" * 32)
PORTED = Artifact("ported", "models/ported/v1/world_boolq", "e1" * 32)
MODEL = "portllm-world_boolq"
PROJECT = Path.cwd().parent / "project"


@pytest.fixture(autouse=True)
def _own_store(monkeypatch):
    _clear_environment(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama with a vocabulary of 32 words, as a ported directory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(29))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[2]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "eos_token", "unk_token"), words, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    folder = tmp_path_factory.mktemp("ported")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory, checkpoint):
    """A project after its pipeline: all stages at once, which is the hardest order."""
    root = tmp_path_factory.mktemp("project")
    report = root / "results/report"
    report.mkdir(parents=True)
    (report / "report.md").write_text("# all arms\n")
    with pytest.MonkeyPatch.context() as env, contextlib.ExitStack() as stages:
        _clear_environment(env)
        env.setenv("PORTLLM_INVOCATION", "one-repro")

        def stage(name, **result):
            tracker = stages.enter_context(track(name, name=f"{name} it", params={"seed": 1}, root=root))
            tracker.finish(**result)
            return tracker

        stage("prepare", writes=[DATA])
        stage("fetch", writes=[V0])
        stage("evolve", reads=[V0], writes=[V1])
        stage("port", reads=[V1, PATCH], writes=[PORTED])
        params = {"out": root / "models/patches/v0", "lora": {"r": 8, "target_modules": ("q_proj", "v_proj")}}
        train = stages.enter_context(track("train", name="train v0/world_boolq", params=params, root=root))
        for step in range(3):
            train.metrics(step * 10, {"loss": 1.0 / (step + 1)})
        train.finish(
            metrics={"acc,none": 0.5, "trainable_parameters": 64},
            reads=[V0, DATA],
            writes=[PATCH],
            datasets=[Dataset("world_boolq", "da" * 32, "data/world_boolq")],
            artifacts=[report, report / "report.md"],
            tags={"portllm.task": "world_boolq"},
        )
        stage("register").register([_request(checkpoint)])
    return root


@pytest.fixture(scope="module")
def client(project):
    with pytest.MonkeyPatch.context() as env:
        _clear_environment(env)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return store.connect(project)


def test_run_contains_the_messages_of_its_stage(client):
    run = _run(client, "train")
    assert run.info.run_name == "train v0/world_boolq"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"out": "models/patches/v0", "lora.r": "8", "lora.target_modules": "q_proj, v_proj"}
    assert run.data.metrics == {"loss": pytest.approx(1 / 3), "acc": 0.5, "trainable_parameters": 64.0}
    assert run.data.tags["portllm.task"] == "world_boolq"
    assert run.data.tags["mlflow.source.name"] == "portllm train"
    curve = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
    assert curve == [(0, 1.0), (10, 0.5), (20, pytest.approx(1 / 3))]
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"report", "report.md"}


def test_a_run_names_its_data_and_the_fingerprints_it_read_and_wrote(client):
    run = _run(client, "train")
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("world_boolq", ("da" * 32)[:36])
    assert json.loads(used.dataset.source) == {"uri": "data/world_boolq"}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    assert run.data.tags[f"portllm.read.{'b0' * 8}"] == V0.name
    assert run.data.tags[f"portllm.write.{'fa' * 8}"] == PATCH.name
    assert json.loads(run.data.tags["portllm.writes"])[0]["fingerprint"] == PATCH.fingerprint


def test_a_run_has_the_commit_that_no_record_contains(tmp_path, monkeypatch):
    """Issue 8, item 20: patch.json and release.json have no commit, so that they are the same at every commit."""
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), (*identity, "commit", "-q", "--allow-empty", "-m", "Begin")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    monkeypatch.chdir(tmp_path)
    with track("train", name="train it", params={}, root=tmp_path) as tracker:
        tracker.finish(reads=[V0], writes=[PATCH])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (step,) = descendants(V0.fingerprint, root=tmp_path)
    assert (step.artifact, step.commit) == (PATCH, head.stdout.strip())


def test_stages_of_one_invocation_share_one_ended_parent(client):
    parents = _runs(client, "tags.`portllm.stage` = 'pipeline'")
    assert [(run.info.run_name, run.info.status) for run in parents] == [("one-repro", "FINISHED")]
    children = _runs(client, f"tags.`mlflow.parentRunId` = '{parents[0].info.run_id}'")
    assert len(children) == 6
    assert parents[0].info.end_time is not None


def test_a_registered_version_leads_back_to_patch_bases_and_data(client, project):
    steps = lineage(MODEL, 1, root=project)
    assert [(step.artifact.name, step.stage) for step in steps] == [
        (PORTED.name, "port"),
        (V1.name, "evolve"),
        (PATCH.name, "train"),
        (V0.name, "fetch"),
        (DATA.name, "prepare"),
    ]
    assert steps[2].datasets[0].source == "data/world_boolq"
    version = client.get_model_version(MODEL, "1")
    assert client.get_run(version.run_id).data.tags["portllm.stage"] == "register"


def test_from_a_base_everything_made_from_it_is_found(project):
    outputs = {step.artifact.name: step.stage for step in descendants(V0.fingerprint, root=project)}
    assert outputs == {V1.name: "evolve", PATCH.name: "train", PORTED.name: "port"}
    assert [step.artifact for step in descendants(PATCH.fingerprint, root=project)] == [PORTED]
    assert descendants(PORTED.fingerprint, root=project) == []


def test_lineage_of_an_unknown_version_says_so(project):
    with pytest.raises(TrackingError, match="version 9 is not in the registry"):
        lineage(MODEL, 9, root=project)


def test_a_registered_version_loads_and_answers(project, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri(project))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri(store.tracking_uri(project))
        model = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion", model_config={"max_new_tokens": 4})
        answers = model.predict(["w1 w2 w3", "w4"])
    assert len(answers) == 2
    assert all(len(answer.split()) <= 4 and set(answer.split()) <= {f"w{i}" for i in range(29)} for answer in answers)
    # the second prompt is padded on the left; alone it is not
    assert model.predict(["w4"]) == [answers[1]]


def test_a_registered_adapter_loads_over_the_base_it_is_given(tmp_path, checkpoint, monkeypatch):
    import mlflow
    import torch
    from mlflow.exceptions import MlflowException
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from portllm.lm.learning.loading import add_lora

    patched = add_lora(AutoModelForCausalLM.from_pretrained(checkpoint), LoraParams(r=2), seed=0)
    for name, weight in patched.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    patched.save_pretrained(tmp_path / "adapter")
    one = dataclasses.replace(_request(tmp_path / "adapter"), name="patched")
    with track("register", name="register", params={}, root=tmp_path) as tracker:
        tracker.register([one])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri(store.tracking_uri(tmp_path))
        with pytest.raises((ValueError, MlflowException), match="load it with model_config"):
            mlflow.pyfunc.load_model("models:/patched/1")
        model = mlflow.pyfunc.load_model("models:/patched/1", model_config={"base": str(checkpoint)})
    inside = model.unwrap_python_model().model
    assert isinstance(inside, PeftModel)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(inside(ids).logits, patched.eval()(ids).logits)


def test_versions_repeat_nothing_and_the_alias_stays_with_the_newest_release(project, checkpoint, client):
    digits = {"v1": "e1", "v10": "ea", "v9": "e9"}
    with track("register", name="register", params={}, root=project) as tracker:
        tracker.register([_request(checkpoint, release=name, ported=two * 32) for name, two in digits.items()])
    again, newer, older = tracker.registered
    assert (again.version, again.created) == ("1", False)
    assert (newer.version, newer.created, newer.aliases) == ("2", True, ["champion"])
    assert (older.version, older.created, older.aliases) == ("3", True, [])
    version = client.get_model_version(MODEL, "2")
    assert (version.tags["release"], version.tags["task"]) == ("v10", "world_boolq")
    assert version.tags["portllm.ported"] == "ea" * 32
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {(one.key, one.value) for one in logged.metrics} == {("world_boolq/acc", 0.9)}
    assert not list((project / "mlartifacts").rglob("*.pkl"))


def test_register_an_existing_version_with_another_alias_sets_the_alias(project, checkpoint, client):
    """Issue 8, item 6."""
    request = dataclasses.replace(_request(checkpoint), name="aliased")
    for alias, is_new in (("champion", True), ("staging", False)):
        with track("register", name="register", params={}, root=project) as tracker:
            tracker.register([dataclasses.replace(request, alias=alias)])
        (version,) = tracker.registered
        assert (version.version, version.created) == ("1", is_new)
    assert version.aliases == ["champion", "staging"]
    assert str(client.get_model_version_by_alias("aliased", "staging").version) == version.version


def test_register_an_older_release_says_that_the_alias_stays(project, checkpoint):
    """Issue 8, item 6: an alias that is not set is reported."""
    newer = dataclasses.replace(_request(checkpoint, release="v2", ported="22" * 32), name="two-releases")
    older = dataclasses.replace(_request(checkpoint, release="v1", ported="11" * 32), name="two-releases")
    with track("register", name="register", params={}, root=project) as tracker:
        tracker.register([newer, older, older])
    notes = [version.note for version in tracker.registered]
    assert notes == ["", *["the alias champion stays on version 1, which is of the later release v2"] * 2]
    assert [version.aliases for version in tracker.registered] == [["champion"], [], []]


def test_register_twice_at_once_creates_one_version(project, checkpoint, client):
    """Issue 8, item 7."""
    request = dataclasses.replace(_request(checkpoint), name="at-once")
    with contextlib.ExitStack() as stages:
        trackers = [
            stages.enter_context(track("register", name=f"register {i}", params={}, root=project)) for i in range(2)
        ]
        for tracker in trackers:  # both recorders work now; leaving the block waits for them
            tracker.register([request])
    versions = [tracker.registered[0] for tracker in trackers]
    assert sorted((version.version, version.created) for version in versions) == [("1", False), ("1", True)]
    assert len(client.search_model_versions("name = 'at-once'")) == 1


def test_register_on_two_machines_at_once_keeps_the_first_version(project, checkpoint, client):
    """Issue 8, item 7: a lock does not reach a second machine that uses the same server."""
    request = {**dataclasses.asdict(_request(checkpoint)), "name": "two-machines", "checkpoint": str(checkpoint)}
    run_id = client.create_run(client.get_experiment_by_name(store.EXPERIMENT).experiment_id).info.run_id

    class OtherMachineFirst:
        """A client during whose first search another machine creates the version."""

        def __init__(self):
            self.searches = 0

        def __getattr__(self, name):
            return getattr(client, name)

        def search_model_versions(self, query):
            self.searches += 1
            versions = client.search_model_versions(query)
            if self.searches == 1:
                list(registry.register(client, run_id, [request], registry_uri="the other machine's lock"))
            return versions

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (version,) = registry.register(OtherMachineFirst(), run_id, [request], registry_uri="this machine's lock")
    assert (version.version, version.created, version.aliases) == ("1", False, ["champion"])
    (left,) = client.search_model_versions("name = 'two-machines'")
    models = [one.model_id for one in client.search_logged_models([client.get_run(run_id).info.experiment_id])]
    assert left.source.removeprefix("models:/") in models
    assert len([one for one in models if client.get_logged_model(one).name.startswith("two-machines")]) == 1


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_stage_that_fails_marks_its_run_and_its_invocation(project, client, monkeypatch, error, status):
    monkeypatch.setenv("PORTLLM_INVOCATION", f"invocation {status}")
    # on a busy machine the import of MLflow alone takes longer than a user waits after an error
    monkeypatch.setattr("portllm.tracking.tracker._WAIT_AFTER_ERROR_SECONDS", 60.0)
    lines = []
    with (  # noqa: PT012 - the stage fails after it sent its result
        pytest.raises(error),
        track("evolve", name=status, params={}, root=project, warn=lines.append) as tracker,
    ):
        tracker.finish(reads=[V0], writes=[Artifact("checkpoint", "models/releases/broken", "0f" * 32)])
        raise error
    assert lines == []
    assert _run(client, "evolve").info.status == status
    (parent,) = _runs(client, f"attributes.run_name = 'invocation {status}'")
    assert parent.info.status == "FAILED"
    # the outputs of a failed run may not exist
    assert "models/releases/broken" not in {step.artifact.name for step in descendants(V0.fingerprint, root=project)}


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_stage_leaves_neither_a_process_nor_a_running_run(project, client, by):
    name = f"killed by {by.name}"
    script = f"""
        import os, time
        from pathlib import Path
        from portllm.tracking import track
        with track("train", name={name!r}, params={{}}, root=Path({str(project)!r})) as tracker:
            time.sleep(0.5)  # a stage killed before its first message leaves no run
            if os.fork():  # a worker of the stage that outlives it and holds its pipes
                print("ready", flush=True)
                time.sleep(90)
            os.close(1)
            time.sleep(90)
    """
    stage = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert stage.stdout.readline() == b"ready\n"
    # DVC and the shell signal the group; the worker gets no signal, so that it holds the pipe
    family = psutil.Process(stage.pid).children()
    recorder = next(one for one in family if "portllm.tracking" in one.cmdline())
    stage.send_signal(by)
    stage.wait(timeout=20)
    stage.stdout.close()
    ended = _ends(recorder, within_seconds=60)
    for worker in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    assert ended
    (run,) = _runs(client, f"attributes.run_name = '{name}'")
    assert run.info.status == "KILLED"


def test_a_server_that_is_down_costs_one_line_and_no_result(tmp_path, monkeypatch, unused_port):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{unused_port}")
    lines = []
    started = time.monotonic()
    with track("train", name="train", params={}, root=tmp_path, warn=lines.append) as tracker:
        tracker.metrics(1, {"loss": 1.0})
        tracker.finish(metrics={"loss": 1.0})
    assert time.monotonic() - started < 30
    (line,) = lines
    assert line.startswith("Warning: the run was not recorded in MLflow (")
    assert "\n" not in line
    assert "hunter2" not in line
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("decisions", [Path("v1.json"), None])
def test_a_registry_that_is_down_is_an_error(tmp_path, monkeypatch, unused_port, decisions):
    """Issue 8, item 11: the decisions are mentioned where they were written, and MLflow's reason is not cut off."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused_port}")
    with pytest.raises(TrackingError, match="not registered in MLflow: ") as caught:  # noqa: PT012, SIM117
        with track("register", name="register", params={}, root=tmp_path) as tracker:
            tracker.register([_request(tmp_path)], decisions=decisions)
    text = str(caught.value)
    assert "Connection refused" in text
    assert text.endswith("run register again")
    assert ("the decisions are in v1.json" in text) == (decisions is not None)


def test_register_names_what_was_registered_before_an_error(project, checkpoint):
    """Issue 8, item 11: "not registered" is not all that a user must know where one of two models is."""
    good, bad = (dataclasses.replace(_request(checkpoint), name=name) for name in ("half-done", "no/name"))
    with pytest.raises(TrackingError, match="'no/name' cannot name .*; half-done version 1 is registered; run"):  # noqa: PT012, SIM117
        with track("register", name="register", params={}, root=project) as tracker:
            tracker.register([good, bad])


def test_one_line_keeps_the_start_and_the_end_of_a_long_error():
    """Issue 8, item 11."""
    line = one_line(f"API request to http://server failed: {'retry ' * 400}\n Errno 111: Connection refused")
    assert line.startswith("API request to http://server failed")
    assert line.endswith("Errno 111: Connection refused")
    assert len(line) < 700


def test_a_stage_that_fails_is_not_blamed_on_the_registry(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    lines = []
    with (  # noqa: PT012 - the stage fails after it requested a version
        pytest.raises(KeyError),
        track("register", name="register", params={}, root=tmp_path, warn=lines.append) as tracker,
    ):
        tracker.register([_request(tmp_path)])
        raise KeyError
    assert len(lines) == 1


@pytest.mark.parametrize("stuck", ["exec sleep 60", "exit 3", "echo boom >&2; exit 1", "printf '{half'"])
def test_a_recorder_that_does_not_work_neither_blocks_nor_fails_the_stage(tmp_path, monkeypatch, stuck):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{stuck}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    lines = []
    before = psutil.Process().children()  # of other tests in this process
    started = time.monotonic()
    with track("train", name="train", params={}, root=tmp_path, warn=lines.append, wait_seconds=1.0) as tracker:
        for step in range(20_000):  # some megabytes: many times what a pipe holds
            tracker.metrics(step, {"loss": 1.0, "learning_rate": 0.1})
    assert time.monotonic() - started < 10
    assert len(lines) == 1
    assert set(psutil.Process().children()) <= set(before)


def test_without_an_interpreter_the_stage_still_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    lines = []
    with track("train", name="train", params={}, root=tmp_path, warn=lines.append) as tracker:
        tracker.finish(metrics={"loss": 1.0})
    assert len(lines) == 1


def test_tracking_that_is_off_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with track("train", name="train", params={}, root=tmp_path, enabled=False) as tracker:
        tracker.metrics(1, {"loss": 1.0})
        tracker.finish(metrics={"loss": 1.0})
        with pytest.raises(TrackingError, match="tracking is off"):
            tracker.register([_request(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_stage_does_not_import_mlflow():
    script = "import sys, portllm.tracking; sys.exit(any(m in sys.modules for m in ('mlflow', 'psutil', 'torch')))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_stages_below_one_dvc_process_are_one_invocation(tmp_path):
    script = tmp_path / "dvc"
    ask = "from portllm.tracking.store import invocation; print(invocation())"
    script.write_text(f"import subprocess, sys\nfor _ in 'ab': subprocess.run([sys.executable, '-c', {ask!r}])\n")

    def keys(*words, **env):
        command = [sys.executable, str(script), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env})
        return done.stdout.splitlines()

    first, second = keys("repro"), keys("repro")
    assert first[0] == first[1] != second[0] == second[1]
    assert "name='repro " in first[0]
    assert "name='puffy-daks'" in keys("exp", "run", DVC_EXP_NAME="puffy-daks")[0]
    assert store.invocation() is None


def test_many_artifacts_fit_into_tags():
    many = [
        {"kind": "ported", "name": f"models/ported/v{i}/world_boolq", "fingerprint": f"{i:064x}"} for i in range(200)
    ]
    tags = ancestry.tags("read", many)
    assert max(map(len, tags.values())) <= 8000
    lists = [json.loads(tags[key]) for key in tags if key.split(".")[1] == "reads"]
    assert [one for part in lists for one in part] == many


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (f"{PROJECT}/models/v0", "models/v0"),
        (f"{PROJECT}/models/../data", "data"),
        (f"{PROJECT.parent}/secret-place/base", ".../base"),
        (str(PROJECT), "."),
        (f"copied {PROJECT}/models/v0", "copied models/v0"),
        ("https://me:pw@hub/x?token=abc&v=1", "https://hub/x?token=***&v=1"),
        ("hf_abcdefghijklmnopqrst", "hf_***"),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
    ],
)
def test_clean_removes_secrets_and_machine_paths(text, cleaned):
    assert clean(text, PROJECT) == cleaned


def test_plain_replaces_values_under_a_secret_name():
    tree = plain({"hub": {"hf_token": "abc", "tokenizer": "words"}, "password": "x"}, Path("/project"))
    assert tree == {"hub": {"hf_token": "***", "tokenizer": "words"}, "password": "***"}


def test_parameters_are_flattened():
    assert flatten({"lora": {"r": 8, "mods": ["a", "b"]}, "x": None}) == {
        "lora.r": "8",
        "lora.mods": "a, b",
        "x": "None",
    }


def test_metric_names_fit_mlflow():
    assert in_alphabet("acc,none") == "acc"
    assert in_alphabet("exact_match,strict-match") == "exact_match.strict-match"
    assert in_alphabet("a:b%") == "a_b_"


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused while it is held
        yield taken.getsockname()[1]


def _ends(process, within_seconds):
    # an orphan that ended may stay a zombie where nothing reaps orphans, as in a container
    limit = time.monotonic() + within_seconds
    while time.monotonic() < limit:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return True
    return False


def _request(folder, release="v1", ported=PORTED.fingerprint):
    return VersionRequest(
        name=MODEL,
        checkpoint=folder,
        release=release,
        task="world_boolq",
        ported=ported,
        base=V1.fingerprint,
        patch=PATCH.fingerprint,
        metrics={"acc,none": 0.9},
        alias="champion",
        description=f"world_boolq ported onto {release}",
    )


def _clear_environment(env):
    for key in list(os.environ):
        if key.startswith(("MLFLOW_", "DVC_", "PORTLLM_")):
            env.delenv(key)


def _runs(client, query):
    return client.search_runs([client.get_experiment_by_name(store.EXPERIMENT).experiment_id], query)


def _run(client, stage):
    return _runs(client, f"tags.`portllm.stage` = '{stage}'")[0]
