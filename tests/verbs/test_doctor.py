"""doctor prints what is needed and whether it is available, in seconds, and never the token."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from portllm import params
from portllm.cli import main
from portllm.errors import ParamsError
from portllm.lm.sizing import equipment, pace
from portllm.lm.sizing.equipment import Gpu, Machine
from portllm.lm.sizing.pace import Pace
from portllm.verbs import doctor

pytestmark = pytest.mark.xdist_group("timed")
ROOT = Path(__file__).parents[2]
FAST = Pace(flops_per_second=700e12, utilisation=0.35, memory_bytes_per_second=3e12)
PROFILE = ROOT / "profiles" / "mistral-7b.yaml"
GIB = 2**30


def gpu(memory: int, name: str = "NVIDIA H100 80GB HBM3") -> Gpu:
    return Gpu(name=name, memory_bytes=memory, free_bytes=memory, bf16=True)


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {
        "cpu": "a processor", "cores": 16, "ram_bytes": 128 * GIB, "ram_available_bytes": 100 * GIB,
        "disk_free_bytes": 2000 * GIB, "gpus": (gpu(80 * GIB),), "packages": dict.fromkeys(equipment.PACKAGES, "1.0"),
        "torch_cuda": "12.8",
    }  # fmt: skip
    return Machine(**{**values, **changes})


def diagnose(monkeypatch: pytest.MonkeyPatch, here: Machine, whole: params.Params, folder: Path) -> dict[str, set[str]]:
    """The statuses of each check, the hub's aside: tests have none."""
    monkeypatch.setattr(equipment, "inspect", lambda _: here)
    diagnosis = doctor.run(params=whole, folder=folder)
    statuses: dict[str, set[str]] = {}
    for check in diagnosis.checks:
        if check.name not in ("model", "hub"):
            statuses.setdefault(check.name, set()).add(check.status)
    return statuses


def test_a_large_gpu_passes_every_check_of_the_papers_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = params.load(PROFILE)
    monkeypatch.setattr(pace, "gpu_pace", lambda _: FAST)
    assert set().union(*diagnose(monkeypatch, machine(), profile, tmp_path).values()) == {"ok"}


@pytest.mark.parametrize(
    ("here", "check"),
    [
        (machine(disk_free_bytes=50 * GIB), "disk"),
        (machine(gpus=(gpu(16 * GIB),)), "memory"),
        (machine(gpus=(), ram_bytes=16 * GIB), "memory"),
        (machine(gpus=()), "time"),
        (machine(torch_cuda=None), "device"),
    ],
)
def test_what_is_missing_fails_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Machine, check: str
) -> None:
    assert "fail" in diagnose(monkeypatch, here, params.load(PROFILE), tmp_path)[check]


@pytest.mark.parametrize(
    ("change", "package"),
    [({"quantization": "4bit"}, "bitsandbytes"), ({"optim": {"attention": "flash_attention_2"}}, "flash-attn")],
)
def test_a_package_that_params_require_must_be_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], package: str
) -> None:
    profile = params.load(PROFILE)
    asking = replace(profile, train=params.override(profile.train, change, where="train"))
    without = machine(packages=dict.fromkeys(equipment.PACKAGES, None))
    assert diagnose(monkeypatch, without, asking, tmp_path)[package] == {"fail"}
    assert package not in diagnose(monkeypatch, without, profile, tmp_path)


@pytest.mark.parametrize(
    ("gpus", "environment", "status"),
    [(8, "gpus-ddp", "fail"), (4, "gpus-ddp", "ok"), (1, "gpus-ddp", "ok"), (8, None, None), (0, "gpus-fsdp", "fail"),
     (3, "gpus-fsdp", "fail"), (0, "cpu-2", "ok"), (4, "absent", "fail")],
)  # fmt: skip
def test_processes_that_cannot_share_a_batch_fail_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, environment: str | None, status: str | None
) -> None:
    monkeypatch.delenv("PORTLLM_ACCELERATE", raising=False)
    if environment is not None:
        monkeypatch.setenv("PORTLLM_ACCELERATE", str(ROOT / "configs" / "accelerate" / f"{environment}.yaml"))
    here = machine(gpus=(gpu(80 * GIB),) * gpus)
    assert diagnose(monkeypatch, here, params.load(PROFILE), tmp_path).get("launch") == ({status} if status else None)


def test_unknown_data_fail_unless_a_file_has_their_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = params.load(PROFILE)
    corpora = {"openorca": params.CorpusParams(source="mine+OpenOrca"), "slimorca": params.CorpusParams(source="a/b")}
    prepare = replace(whole.prepare, data="data", corpora=corpora)
    mine = replace(whole, tasks=("boolq", "my_own"), prepare=prepare)
    monkeypatch.setattr(equipment, "inspect", lambda _: machine())

    def details() -> list[str]:
        return [check.detail for check in doctor.run(params=mine, folder=tmp_path).checks if check.name == "data"]

    task, corpus = details()
    assert task.startswith("my_own: neither in data nor a task of the harness")
    assert corpus.startswith("mine: neither in data nor a known corpus nor a dataset of the hub")
    (tmp_path / "data").mkdir()
    for name in ("my_own", "mine"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("")
    assert details() == []


def test_a_model_without_a_size_has_a_verdict_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "abacus"}')
    (tmp_path / "params.yaml").write_text("tasks: [world_sst2]\nreleases: [v0]\nfetch: {source: model}\n")
    done = CliRunner().invoke(main, ["doctor", "--params", "params.yaml"])
    assert done.exit_code == 0, done.output
    assert "Nothing was estimated, as the size of a model is not known" in done.output.splitlines()[-1]
    assert "no experiment was given" in CliRunner().invoke(main, ["doctor"]).output.splitlines()[-1]


def test_linked_caches_count_each_byte_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(equipment, "inspect", lambda _: machine())
    whole = params.load(ROOT / "params.yaml")
    twice = doctor.run(params=whole, folder=tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[cache]\n    type = reflink,hardlink,copy\n")
    once = doctor.run(params=whole, folder=tmp_path)
    assert twice.disk_bytes == 2 * once.disk_bytes > 0


def test_the_command_answers_quickly_with_one_object_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    runner = CliRunner()
    start = time.monotonic()
    fits = runner.invoke(main, ["doctor", "--params", str(ROOT / "params.yaml"), "--json"])
    assert time.monotonic() - start < 5
    tree = json.loads(fits.stdout)
    assert (fits.exit_code, tree["ok"]) == (0, True)
    assert [s["stage"] for s in tree["stages"]] == ["prepare", "fetch", "evolve", "train", "port", "evaluate", "report"]
    cannot = runner.invoke(main, ["doctor", "--params", str(PROFILE)])
    assert cannot.exit_code == 1
    assert "FAIL model: mistralai/Mistral-7B-v0.1" in cannot.output
    assert "a token is set" in cannot.output
    assert "hf_secret" not in cannot.output + fits.output
    assert runner.invoke(main, ["doctor"]).exit_code == 0


def test_nvidia_smi_is_read_and_hidden_devices_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 81000, 9.0\n1, GPU-bb, Tesla T4, 15360, 15000, 7.5\n"
    monkeypatch.setattr(equipment, "_nvidia_smi", lambda: answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = equipment._gpus()
    assert (first.bf16, first.name, first.memory_bytes) == (True, "NVIDIA H100 80GB HBM3", 81559 * 2**20)
    assert (second.bf16, second.free_bytes) == (False, 15000 * 2**20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [one.name for one in equipment._gpus()] == ["Tesla T4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list(equipment._gpus()) == []


def test_as_if_has_the_memory_of_its_gpu_and_no_hours(tmp_path: Path) -> None:
    profile = params.load(PROFILE)
    large, small = (doctor.run(params=profile, folder=tmp_path, as_if=name) for name in ("H100", "a100:40"))
    assert (large.device, small.device) == ("H100", "A100")
    assert small.machine.gpus[0].memory_bytes == 40 * 10**9
    assert (large.hours, {stage.seconds for stage in large.stages}) == (None, {None})
    with pytest.raises(ParamsError, match="H100"):
        doctor.run(params=profile, folder=tmp_path, as_if="abacus")


def test_hours_are_given_only_for_a_measured_pace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Issue 9, part 3: no hours of a GPU that is not here; one line names the commands that measure them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(equipment, "inspect", lambda _: machine())
    monkeypatch.setattr(pace, "gpu_pace", lambda _: FAST)
    call = ["doctor", "--params", str(PROFILE)]
    measured = CliRunner().invoke(main, call)
    assert "ok   time: about " in measured.output
    assert "35% of 700 TFLOP/s, measured now" in measured.output
    imagined = CliRunner().invoke(main, [*call, "--as-if", "H100"])
    assert "note time: no pace was measured for H100" in imagined.output
    assert "python benchmarks/efficiency.py" in imagined.output
    rows = [line for line in imagined.output.splitlines() if line.startswith(("prepare", "train", "in all"))]
    assert [row.split()[-1] for row in rows] == ["–", "–", "–"]
    tree = json.loads(CliRunner().invoke(main, [*call, "--as-if", "H100", "--json"]).stdout)
    assert tree["hours"] is None
    assert tree["models"]["v0"]["parameters"] == 7_241_732_096


def test_an_architecture_without_formulas_is_counted_and_the_rest_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import GPT2Config

    monkeypatch.chdir(tmp_path)
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "model")
    text = "tasks: [world_sst2]\nreleases: [v0]\nfetch: {source: model}\n"
    (tmp_path / "params.yaml").write_text(text + "train: {lora: {target_modules: [c_attn]}}\n")
    done = CliRunner().invoke(main, ["doctor", "--params", "params.yaml"])
    assert done.exit_code == 0, done.output
    assert "activations are not counted" in done.output
    assert "not counted in train, as it is not known: activations and time of v0" in done.output
    assert "note time: not estimated for this architecture" in done.output
    (tmp_path / "params.yaml").write_text(text)
    refused = CliRunner().invoke(main, ["doctor", "--params", "params.yaml"])
    assert refused.exit_code == 1
    assert "FAIL lora: model has no module down_proj, gate_proj, k_proj" in refused.output
