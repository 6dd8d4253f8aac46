"""A dry run prints every tensor that would change, how and out of what, and writes nothing; --json carries the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from portllm.checkpoint.record.records import PortRecord
from portllm.cli import main
from portllm.cli.porting import folded

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")


@pytest.fixture
def dry(tmp_path: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]) -> Callable[..., Result]:
    tensors = {f"{module}.weight": torch.ones(6, 4) for module in MODULES}
    tensors |= {"model.embed_tokens.weight": torch.ones(11, 4), "lm_head.weight": torch.ones(11, 4)}
    base = make_checkpoint(tmp_path / "base", tensors)
    pairs = {module: (torch.ones(2, 4), torch.ones(6, 2)) for module in MODULES}
    patch = make_patch(tmp_path / "patch", pairs, target_modules=["q_proj", "up_proj"])

    def run(*words: str) -> Result:
        out = str(tmp_path / "out")
        return CliRunner().invoke(
            main, ["--no-track", "port", str(patch), "--onto", str(base), "--out", out, "--dry-run", *words]
        )

    return run


def test_one_line_for_each_changed_tensor_and_the_totals(dry: Callable[..., Result], tmp_path: Path) -> None:
    done = dry()
    assert done.exit_code == 0, done.output
    *rows, total = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == sorted(f"{module}.weight" for module in MODULES)
    assert all("F32" in row and "6×4" in row for row in rows)
    assert f"from base_model.model.{MODULES[1]}.lora_{{A,B}}.weight" in rows[0]
    assert total.startswith("dry run: 2 tensors would change")
    assert "2 would be copied" in total
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "patch"]


def test_json_carries_the_same(dry: Callable[..., Result]) -> None:
    told = json.loads(dry("--json").stdout)
    assert [change["tensor"] for change in told["plan"]["changes"]] == sorted(f"{module}.weight" for module in MODULES)
    assert told["plan"]["changes"][0]["from"] == [f"base_model.model.{MODULES[1]}.lora_{s}.weight" for s in "AB"]
    assert told["plan"]["config"] == {}
    assert told["tensors"] == {"changed": 2, "copied": 2}


def test_an_adapter_is_only_copied(dry: Callable[..., Result]) -> None:
    assert "stay in the patch" in dry("--as", "adapter").stdout


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.weight"], "a.weight"),
        (["m.lora_A.weight", "m.lora_B.weight"], "m.lora_{A,B}.weight"),
        (["x", "xy"], "x{,y}"),
        (["same", "same"], "same{,}"),
        ([f"t{i}" for i in range(9)], "t0 … t8 (9 tensors)"),
        (["evil\x1b[2J\n"], "evil\\x1b[2J\\n"),
    ],
)
def test_names_are_folded_and_harmless(names: list[str], short: str) -> None:
    assert folded(names) == short


def test_the_contracts_keys(dry: Callable[..., Result]) -> None:
    told = json.loads(dry("--json").stdout)
    assert set(told) == {
        "out", "as", "method", "scale", "modules", "tensors", "bytes", "wall_seconds", "peak_rss_bytes", "base",
        "patch", "plan",
    }  # fmt: skip
    assert set(told["patch"]) == {"fingerprint", "trained_on"}
    assert PortRecord.FILE not in told
