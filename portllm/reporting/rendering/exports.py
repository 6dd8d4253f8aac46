"""Export the findings as metrics.json for `dvc metrics` and as CSV files for `dvc plots`; no time is in them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portllm.reporting.findings.arms import ARMS, RECALL_ARMS, Comparison, mean
from portllm.reporting.findings.summary import Findings
from portllm.reporting.sections.elements import ARM_NAMES

DIGITS = 6


def metrics(findings: Findings) -> dict[str, Any]:
    """Return a tree of numbers by release, without unknown values."""
    return _rounded({release: _release(findings, release) for release in findings.releases})


def plots(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each CSV by file name."""
    return {
        "scores.csv": _scores(findings),
        "knowledge.csv": _recall_rows(findings),
        "training.csv": _training(findings),
        "drift.csv": _drift(findings),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one CSV with the first row's keys as its head; an empty table is an empty file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _release(findings: Findings, release: str) -> dict[str, Any]:
    average = findings.average(release)
    drift = {d.against: d.overall for d in findings.drifts if d.release == release}
    return {
        "mean": {
            "base": average.base,
            "ported": average.ported,
            "retuned": average.retuned,
            "recovery": average.recovery,
            "negative_flips": average.negative_flips,
        }
        if average.comparisons
        else {},
        **{one.task: _arms(one) for one in findings.on(release)},
        "knowledge": _recalls(findings, release),
        "drift": {f"from_{against}": value for against, value in drift.items()},
        "residual": {
            r.task: {"over_weights": r.over_weights, "over_patch": r.over_patch}
            for r in findings.residuals
            if r.release == release
        },
        "probe": dict(findings.probes.get(release, {})),
    }


def _arms(one: Comparison) -> dict[str, Any]:
    pairing, flips = one.against_retuned, one.flips
    return {
        **{arm: one.value(arm) for arm in ARMS},
        "recovery": one.recovery,
        "difference": pairing.difference if pairing else None,
        "mcnemar_p": pairing.p_value if pairing else None,
        "negative_flips": flips.negative if flips else None,
        "positive_flips": flips.positive if flips else None,
        "format": one.scores["ported"].format if "ported" in one.scores else None,
    }


def _recalls(findings: Findings, release: str) -> dict[str, Any]:
    rows = [k for k in findings.recalls if k.release == release]
    tree: dict[str, Any] = {}
    for arm in RECALL_ARMS:
        group = [k for k in rows if k.arm == arm]
        kinds = dict.fromkeys(kind for k in group for kind in k.facts)
        tree[arm] = {kind: mean(k.facts.get(kind) for k in group) for kind in kinds}
        tree[arm]["perplexity"] = mean(k.perplexity for k in group)
    return tree


def _rounded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree without values that are None or empty, with numbers of equal precision."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        leaf = _rounded(value) if isinstance(value, Mapping) else value
        if leaf is not None and leaf != {}:
            kept[key] = round(leaf, DIGITS) if isinstance(leaf, float) else leaf
    return kept


def _scores(findings: Findings) -> list[dict[str, Any]]:
    return [
        {
            "release": one.release,
            "task": one.task,
            "arm": ARM_NAMES[arm],
            "score": round(score.value, DIGITS),
            "low": round(score.low, DIGITS),
            "high": round(score.high, DIGITS),
            "series": f"{one.task} {ARM_NAMES[arm]}",
        }
        for one in findings.comparisons
        for arm, score in one.scores.items()
    ]


def _recall_rows(findings: Findings) -> list[dict[str, Any]]:
    return [
        {
            "release": k.release,
            "corpus": k.corpus,
            "arm": ARM_NAMES[k.arm],
            "patch": k.patch_task or "",
            "kind": kind,
            "recall": round(recall, DIGITS),
        }
        for k in findings.recalls
        for kind, recall in k.facts.items()
    ]


def _training(findings: Findings) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": round(loss, DIGITS),
            "release": c.release,
            "task": c.task,
            "series": f"{c.release} {c.task}",
        }
        for c in findings.curves
        for step, loss in zip(c.steps, c.losses, strict=True)
    ]


def _drift(findings: Findings) -> list[dict[str, Any]]:
    return [
        {
            "release": d.release,
            "against": d.against,
            "module": m.module,
            "layer": "" if m.layer is None else m.layer,
            "kind": m.kind,
            "drift_ratio": round(m.drift_ratio, DIGITS),
        }
        for d in findings.drifts
        for m in d.modules
        if m.drift_ratio is not None
    ]
