"""--launch: what is no configuration, or asks for GPUs that are not there, is said before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from portllm import cli
from portllm.cli import launching

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
WORDS = ["train", "--base", "base", "--task", "sst2", "--out", "patch"]


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "No such file"), ("num_processes: 2", "num_machines"), ("[", "another file"), ("7", "another file")],
)
def test_what_is_no_configuration_is_said(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "launch.yaml"
    if text is not None:
        file.write_text(text)
    done = CliRunner().invoke(cli.main, [*WORDS, "--launch", str(file)])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "expected an accelerate configuration" in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_each_configuration_asks_for_what_its_name_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for gpus in (0, 1, 4, 8):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        try:
            counts[gpus] = launching._processes(CONFIGS / name)
        except launching.MachineError:
            counts[gpus] = 0
    expected = {
        "cpu-2.yaml": {0: 2, 1: 2, 4: 2, 8: 2},
        "two-machines-fsdp.yaml": {0: 0, 1: 16, 4: 16, 8: 16},
    }.get(name, {0: 0, 1: 1, 4: 4, 8: 8})
    assert counts == expected


@pytest.mark.parametrize(
    ("words", "launched"),
    [
        (["fetch", "world"], True),
        (["fetch", "scratch"], True),
        (["fetch"], True),
        (["fetch", "owner/name"], False),
        (["fetch", "--params", "params.yaml"], False),
        (["evolve", "--base", "b"], True),
        (["evolve", "--base", "b", "--params", "params.yaml", "--release", "trained"], True),
        (["evolve", "--base", "b", "--params", "params.yaml", "--release", "real"], False),
    ],
)
def test_a_release_that_is_only_copied_is_copied_once(
    words: list[str], launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    releases = "{real: {base: v0, source: owner/name}, trained: {base: v0}}"
    (tmp_path / "params.yaml").write_text(f"fetch: {{source: owner/name}}\nevolve: {{releases: {releases}}}\n")
    (tmp_path / "out").write_text("in the way, so that what is not launched ends here")
    counts: list[int] = []
    monkeypatch.setattr(launching, "_launch", lambda _, count, __: counts.append(count) or 0)
    done = CliRunner().invoke(cli.main, ["--no-track", *words, "--out", "out", "--launch", str(CONFIGS / "cpu-2.yaml")])
    assert (counts, done.exit_code) == (([2], 0) if launched else ([], 1)), done.output


def test_on_one_gpu_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a machine's environment may name the configuration for good."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(launching, "_launch", lambda *_: pytest.fail("launched"))
    monkeypatch.setenv(launching.ENVIRONMENT, str(CONFIGS / "gpus-ddp.yaml"))
    done = CliRunner().invoke(cli.main, WORDS)
    assert done.exit_code == 1
    assert "base" in done.stderr


def test_one_of_several_processes_launches_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch -m portllm` where the machine's environment names a configuration, too."""
    monkeypatch.setattr(launching, "_launch", lambda *_: pytest.fail("launched"))
    for name, value in {launching.ENVIRONMENT: str(CONFIGS / "cpu-2.yaml"), "TORCHELASTIC_RUN_ID": "job",
                        "WORLD_SIZE": "2", "RANK": "0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(cli.main, ["--no-track", *WORDS])
    assert done.exit_code == 1
    assert "base" in done.stderr
