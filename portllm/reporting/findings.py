"""Everything the report states, computed once: tables, pictures, metrics.json and the paragraph all read this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from portllm.params import Params
from portllm.reporting import arms, costs, knowledge, paper, weights
from portllm.reporting.arms import Cell, Control, mean
from portllm.reporting.costs import CostPair, StageCost
from portllm.reporting.evidence import Curve, Evidence
from portllm.reporting.knowledge import Knowledge
from portllm.reporting.paper import Beside
from portllm.reporting.weights import Drift, Residual, Unmeasured


@dataclass(frozen=True, kw_only=True)
class Average:
    """Means over the tasks that have all of base, ported and retuned on one release."""

    release: str
    cells: tuple[Cell, ...]
    base: float | None
    ported: float | None
    retuned: float | None
    negative_flips: float | None

    @property
    def recovery(self) -> float | None:
        return arms.recovery(self.base, self.ported, self.retuned)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was found; `fingerprints` names the releases it was found on."""

    releases: tuple[str, ...]
    tasks: tuple[str, ...]
    probe_threshold: float
    probes: Mapping[str, Mapping[str, float]]
    fingerprints: Mapping[str, str | None]
    cells: tuple[Cell, ...]
    controls: tuple[Control, ...]
    knowledge: tuple[Knowledge, ...]
    drifts: tuple[Drift, ...]
    residuals: tuple[Residual, ...]
    unmeasured: tuple[Unmeasured, ...]
    curves: tuple[Curve, ...]
    costs: tuple[CostPair, ...]
    stages: tuple[StageCost, ...]
    published: Beside = Beside()
    chain: bool = True  # each release comes from the one before it

    @property
    def first(self) -> str:
        return self.releases[0]

    @property
    def unknown_tasks(self) -> tuple[str, ...]:
        """Tasks whose probe on the first release, where the patches are made, is below the threshold."""
        probe = self.probes.get(self.first, {})
        return tuple(t for t in self.tasks if t in probe and probe[t] < self.probe_threshold)

    def on(self, release: str) -> tuple[Cell, ...]:
        """The cells of one release, one per task."""
        return tuple(cell for cell in self.cells if cell.release == release)

    def average(self, release: str) -> Average:
        """Means over the tasks of one release where the three arms can be compared; over what there is otherwise."""
        whole = [c for c in self.on(release) if {"base", "ported", "retuned"} <= set(c.scores)]
        cells = whole or [c for c in self.on(release) if "ported" in c.scores]
        return Average(
            release=release,
            cells=tuple(cells),
            base=mean(c.value("base") for c in cells),
            ported=mean(c.value("ported") for c in cells),
            retuned=mean(c.value("retuned") for c in cells),
            negative_flips=mean(c.flips.negative if c.flips else None for c in cells),
        )


def find(evidence: Evidence, *, params: Params, models: Path) -> Findings:
    """Compute all findings. Raises DataError and PatchError."""
    records = evidence.records
    residuals = weights.residuals(params, models)
    return Findings(
        releases=evidence.releases,
        tasks=evidence.tasks,
        probe_threshold=params.report.probe_threshold,
        probes={
            name: {task: share for task, share in record.probe.items() if task in evidence.tasks}
            for name, record in records.items()
            if record
        },
        fingerprints={name: record.fingerprint if record else None for name, record in records.items()},
        cells=arms.compare(evidence, params.report),
        controls=arms.controls(evidence),
        knowledge=knowledge.gather(evidence),
        drifts=weights.drifts(params, models),
        residuals=tuple(r for r in residuals if isinstance(r, Residual)),
        unmeasured=tuple(r for r in residuals if isinstance(r, Unmeasured)),
        curves=evidence.curves,
        costs=costs.pairs(evidence),
        stages=costs.stages(evidence),
        published=paper.beside(params),
        chain=all(params.evolve.releases[b].base == a for a, b in pairwise(evidence.releases)),
    )


def total_seconds(pairs: Sequence[CostPair]) -> tuple[float, float] | None:
    """(porting, re-tuning) seconds over the pairs that have both; None when none has."""
    both = [(p.port.wall_seconds, p.retune.wall_seconds) for p in pairs if p.port and p.retune]
    return (sum(p for p, _ in both), sum(r for _, r in both)) if both else None
