"""Compute everything the report states, once: sections, pictures, metrics.json and the headline all read `Findings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from portllm.params import Params
from portllm.reporting.findings import arms, weights
from portllm.reporting.findings.arms import Comparison, Control, Recall, mean
from portllm.reporting.findings.literature import PublishedFigures, published_figures
from portllm.reporting.findings.weights import Drift, Residual, Unmeasured
from portllm.reporting.results import Results, TrainingCurve


@dataclass(frozen=True, kw_only=True)
class Average:
    """Means over the tasks that have all of base, ported and retuned on one release."""

    release: str
    comparisons: tuple[Comparison, ...]
    base: float | None
    ported: float | None
    retuned: float | None
    negative_flips: float | None

    @property
    def recovery(self) -> float | None:
        """Return the recovery of the means; None where it is undefined."""
        return arms.recovery(self.base, self.ported, self.retuned)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that the report states; `chain` is true where each release comes from the one before."""

    releases: tuple[str, ...]
    tasks: tuple[str, ...]
    probe_threshold: float
    probes: Mapping[str, Mapping[str, float]]
    fingerprints: Mapping[str, str | None]
    comparisons: tuple[Comparison, ...]
    controls: tuple[Control, ...]
    recalls: tuple[Recall, ...]
    drifts: tuple[Drift, ...]
    residuals: tuple[Residual, ...]
    unmeasured: tuple[Unmeasured, ...]
    curves: tuple[TrainingCurve, ...]
    published: PublishedFigures = PublishedFigures()
    chain: bool = True

    @property
    def first(self) -> str:
        """Return the release the patches were trained on."""
        return self.releases[0]

    @property
    def unknown_tasks(self) -> tuple[str, ...]:
        """Return the tasks whose probe on the first release is below the threshold."""
        probe = self.probes.get(self.first, {})
        return tuple(t for t in self.tasks if t in probe and probe[t] < self.probe_threshold)

    def on(self, release: str) -> tuple[Comparison, ...]:
        """Return the comparisons of one release, one per task."""
        return tuple(one for one in self.comparisons if one.release == release)

    def average(self, release: str) -> Average:
        """Return means over the tasks of one release that have all three arms, else over those that were ported."""
        complete = [c for c in self.on(release) if {"base", "ported", "retuned"} <= set(c.scores)]
        rows = complete or [c for c in self.on(release) if "ported" in c.scores]
        return Average(
            release=release,
            comparisons=tuple(rows),
            base=mean(c.value("base") for c in rows),
            ported=mean(c.value("ported") for c in rows),
            retuned=mean(c.value("retuned") for c in rows),
            negative_flips=mean(c.flips.negative if c.flips else None for c in rows),
        )


def find(results: Results, *, params: Params, models: Path) -> Findings:
    """Compute all findings. Raises DataError and PatchError."""
    records = results.records
    residuals = weights.residuals(params, models)
    return Findings(
        releases=results.releases,
        tasks=results.tasks,
        probe_threshold=params.report.probe_threshold,
        probes={
            name: {task: share for task, share in record.probe.items() if task in results.tasks}
            for name, record in records.items()
            if record
        },
        fingerprints={name: record.fingerprint if record else None for name, record in records.items()},
        comparisons=arms.compare(results, params.report),
        controls=arms.controls(results),
        recalls=arms.recalls(results),
        drifts=weights.drifts(params, models),
        residuals=tuple(r for r in residuals if isinstance(r, Residual)),
        unmeasured=tuple(r for r in residuals if isinstance(r, Unmeasured)),
        curves=results.curves,
        published=published_figures(params),
        chain=all(params.evolve.releases[b].base == a for a, b in pairwise(results.releases)),
    )
