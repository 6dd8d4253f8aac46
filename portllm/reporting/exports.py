"""metrics.json for `dvc metrics`, and the CSV files for `dvc plots`. No clock is in them: they are reproducible."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portllm.reporting.arms import ARMS, Cell, mean
from portllm.reporting.findings import Findings
from portllm.reporting.knowledge import KNOWERS
from portllm.reporting.names import ARM_NAMES

DIGITS = 6


def metrics(findings: Findings) -> dict[str, Any]:
    """A tree of numbers: release → what was measured on it. What is not known is left out."""
    tree = {release: _release(findings, release) for release in findings.releases}
    return _known(tree)


def plots(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """Rows of each CSV by file name."""
    return {
        "scores.csv": _scores(findings),
        "knowledge.csv": _knowledge_rows(findings),
        "training.csv": _training(findings),
        "drift.csv": _drift(findings),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One CSV with the first row's keys as its head; an empty table is an empty file."""
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
        if average.cells
        else {},
        **{cell.task: _cell(cell) for cell in findings.on(release)},
        "knowledge": _knowledge(findings, release),
        "drift": {f"from_{against}": value for against, value in drift.items()},
        "residual": {
            r.task: {"over_weights": r.over_weights, "over_patch": r.over_patch}
            for r in findings.residuals
            if r.release == release
        },
        "probe": dict(findings.probes.get(release, {})),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    pairing, flips = cell.against_retuned, cell.flips
    return {
        **{arm: cell.value(arm) for arm in ARMS},
        "recovery": cell.recovery,
        "difference": pairing.difference if pairing else None,
        "mcnemar_p": pairing.p_value if pairing else None,
        "negative_flips": flips.negative if flips else None,
        "positive_flips": flips.positive if flips else None,
        "format": cell.scores["ported"].format if "ported" in cell.scores else None,
    }


def _knowledge(findings: Findings, release: str) -> dict[str, Any]:
    rows = [k for k in findings.knowledge if k.release == release]
    tree: dict[str, Any] = {}
    for arm in KNOWERS:
        group = [k for k in rows if k.arm == arm]
        kinds = dict.fromkeys(kind for k in group for kind in k.recall)
        tree[arm] = {kind: mean(k.recall.get(kind) for k in group) for kind in kinds}
        tree[arm]["perplexity"] = mean(k.perplexity for k in group)
    return tree


def _known(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without what is None or empty, numbers rounded so that they read well side by side."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        known = _known(value) if isinstance(value, Mapping) else value
        if known is not None and known != {}:
            kept[key] = round(known, DIGITS) if isinstance(known, float) else known
    return kept


def _scores(findings: Findings) -> list[dict[str, Any]]:
    return [
        {
            "release": cell.release,
            "task": cell.task,
            "arm": ARM_NAMES[arm],
            "score": round(score.value, DIGITS),
            "low": round(score.low, DIGITS),
            "high": round(score.high, DIGITS),
            "series": f"{cell.task} {ARM_NAMES[arm]}",
        }
        for cell in findings.cells
        for arm, score in cell.scores.items()
    ]


def _knowledge_rows(findings: Findings) -> list[dict[str, Any]]:
    return [
        {
            "release": k.release,
            "corpus": k.corpus,
            "arm": ARM_NAMES[k.arm],
            "patch": k.patch_task or "",
            "kind": kind,
            "recall": round(recall, DIGITS),
        }
        for k in findings.knowledge
        for kind, recall in k.recall.items()
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
