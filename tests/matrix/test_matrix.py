"""Every configuration on every architecture: right, or refused by name with nothing written. Never wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from portllm.algebra.lora import round_once
from portllm.errors import PortllmError
from portllm.params import PortParams
from portllm.verbs import port
from tests.matrix import judge
from tests.matrix.cases import CASES, NARROW, SCALED, UNSCALED
from tests.matrix.judge import NEW, OLD, Bench, Case

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of their own affairs

RIGHT = [case for case in CASES if case.refused is None]
REFUSED = [case for case in CASES if case.refused is not None]
NAMED = {str(case): case for case in CASES}


def ported(case: Case, bench: Bench, patch: Path, out: Path, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """Port onto the new base, with the old one available where the case says so."""
    source = bench.base(case.architecture, OLD) if case.source else None
    onto = bench.base(case.architecture, NEW, dtype)
    port.run(patch=patch, onto=onto, out=out, params=PortParams(**more), source=source)


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_right(case: Case, bench: Bench, tmp_path: Path) -> None:
    new, out = bench.base(case.architecture, NEW), tmp_path / "out"
    patch, bare = bench.patches(case, tmp_path)
    oracle = bench.tuned(case, bare)
    expected = judge.logits(oracle)
    scale = judge.effect(case, bench, expected)

    ported(case, bench, patch, out)
    model = judge.load(case.arch, out)
    judge.assert_logits(judge.logits(model), expected, scale)
    base = judge.load(case.arch, new)
    names = judge.differing(base, oracle) if case.residual else judge.touched(oracle, bare)
    assert judge.differing(base, model) == names
    judge.assert_files(new, out)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (new, out))
    assert {**before, **case.changed_config} == after

    ported(case, bench, patch, tmp_path / "adapter", as_="adapter")
    again = bench.tuned(case, tmp_path / "adapter", plain=True)
    judge.assert_logits(judge.logits(again), expected, scale)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(case: Case, bench: Bench, tmp_path: Path) -> None:
    patch, _ = bench.patches(case, tmp_path)
    present = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(PortllmError, match=case.refused) as caught:
        ported(case, bench, patch, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == present


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_narrow_weights_are_the_exact_ones_rounded_once(
    case: Case, dtype: torch.dtype, bench: Bench, tmp_path: Path
) -> None:
    patch, out = bench.patch(case, tmp_path / "patch"), tmp_path / "out"
    expected = judge.logits(bench.tuned(case, patch, dtype))
    exact = judge.exact(case, bench, patch, dtype)
    ported(case, bench, patch, out, dtype)
    weights = case.arch.auto_class.from_pretrained(out).state_dict()
    assert weights.keys() == exact.keys()
    for name, weight in exact.items():
        assert torch.equal(weights[name].to(dtype), round_once(weight, dtype)), name  # gpt_oss loads norms as float32
    assert {tensor.dtype for shard in judge.shards(out).values() for tensor in shard.values()} == {dtype}
    moved = (expected - bench.bare(case.architecture, dtype)).abs().max().item()
    if not case.arch.experts:  # a router's choice may turn on a rounding
        # what is left is the rounding of the weights, small compared with the effect of the patch
        assert_close(judge.logits(judge.load(case.arch, out)), expected, rtol=0, atol=0.03 * moved)


@pytest.mark.parametrize("name", SCALED)
def test_scale_multiplies_the_difference(name: str, bench: Bench, tmp_path: Path) -> None:
    case = NAMED[name]
    patch, _ = bench.patches(case, tmp_path)
    ported(case, bench, patch, tmp_path / "unscaled")
    ported(case, bench, patch, tmp_path / "out", scale=-0.75)
    ported(case, bench, patch, tmp_path / "adapter", as_="adapter", scale=-0.75)
    folders = (bench.base(case.architecture, NEW), tmp_path / "unscaled", tmp_path / "out")
    base, unscaled, scaled = (judge.load(case.arch, folder).state_dict() for folder in folders)
    for key, weight in base.items():
        assert_close(scaled[key] - weight, -0.75 * (unscaled[key] - weight), rtol=1e-4, atol=1e-6)
    expected = judge.logits(bench.tuned(case, tmp_path / "adapter", plain=True))
    judge.assert_logits(judge.logits(judge.load(case.arch, folders[2])), expected, judge.effect(case, bench, expected))


@pytest.mark.parametrize("as_", ["merged", "adapter"])
@pytest.mark.parametrize("name", UNSCALED)
def test_what_has_no_scale_is_refused_one(name: str, as_: str, bench: Bench, tmp_path: Path) -> None:
    patch, _ = bench.patches(NAMED[name], tmp_path)
    with pytest.raises(PortllmError, match=r"scale is 0\.5"):
        ported(NAMED[name], bench, patch, tmp_path / "out", as_=as_, scale=0.5)
    assert not (tmp_path / "out").exists()


def test_no_case_stands_twice() -> None:
    assert len(NAMED) == len(CASES)
