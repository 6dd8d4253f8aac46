"""metrics.json and the plots: nothing unknown in them, and every column that DVC's templates ask for."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from portllm.reporting.findings.summary import Findings
from portllm.reporting.findings.weights import Drift, ModuleDrift
from portllm.reporting.rendering import exports
from portllm.reporting.results import TrainingCurve

TEMPLATES = Path(__file__).parents[2] / ".dvc" / "plots"


def leaves(tree: Any) -> list[Any]:
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]


@pytest.fixture
def full(good: Findings) -> Findings:
    modules = (ModuleDrift(module="m.0.q", layer=0, kind="q", drift_ratio=0.123456789),)
    drift = Drift(release="v1", against="v0", overall=0.1, modules=modules, not_compared=())
    curve = TrainingCurve(release="v0", task="t1", steps=(1, 2), losses=(2.0, 1.0))
    return dataclasses.replace(good, drifts=(drift,), curves=(curve,))


def test_metrics_are_numbers_only_and_leave_out_the_unknown(full: Findings) -> None:
    tree = exports.metrics(full)
    assert all(isinstance(leaf, (int, float)) for leaf in leaves(tree))
    assert tree["v1"]["mean"] == {
        "base": 0.5, "ported": 0.93, "retuned": 0.95, "recovery": 0.955556, "negative_flips": 0.02,
    }  # fmt: skip
    assert "retuned" not in tree["v0"]["t1"]
    assert tree["v1"]["knowledge"]["old"]["changed"] == 0.04
    assert tree["v1"]["drift"] == {"from_v0": 0.1}


def test_an_empty_table_is_an_empty_file(tmp_path: Path) -> None:
    exports.write_csv(tmp_path / "none.csv", [])
    assert (tmp_path / "none.csv").read_bytes() == b""
    exports.write_csv(tmp_path / "one.csv", [{"a": 1, "b": "x,y"}])
    assert (tmp_path / "one.csv").read_text() == 'a,b\n1,"x,y"\n'


@pytest.mark.parametrize(("template", "table"), [("scores", "scores"), ("curves", "training"), ("drift", "drift")])
def test_dvc_templates_find_their_columns(full: Findings, template: str, table: str) -> None:
    text = (TEMPLATES / f"{template}.json").read_text()
    json.loads(text)
    columns = set(exports.plots(full)[f"{table}.csv"][0])
    computed = {"rev", *re.findall(r'"as": "(\w+)"', text)}  # by DVC, and by the template itself
    fields = set(re.findall(r'"field": "(\w+)"|datum\.(\w+)', text))
    assert {field or datum for field, datum in fields} <= columns | computed
