"""Compare costs: re-tuning a patch on a release against porting the old one onto it, and what each stage took.

Costs are observations: they differ from run to run, so no hashed result and no other finding contains one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from portllm.params import Params
from portllm.reporting.findings.literature import PublishedCost, published_figures
from portllm.reporting.results import Cost, require_names


@dataclass(frozen=True, order=True)
class Execution:
    """One execution of a stage of the pipeline, on a release and perhaps a task."""

    stage: str
    release: str | None
    task: str | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self.stage, self.release, self.task) if part)


@dataclass(frozen=True, kw_only=True)
class CostPair:
    """One task on one release after the first; None where the stage wrote no cost file."""

    release: str
    task: str
    port: Cost | None
    retune: Cost | None

    @property
    def speedup(self) -> float | None:
        """Return seconds of re-tuning over seconds of porting."""
        if self.port is None or self.retune is None or self.port.wall_seconds <= 0:
            return None
        return self.retune.wall_seconds / self.port.wall_seconds


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """A complete stage: executions, their summed seconds, the largest peak."""

    stage: str
    executions: int
    wall_seconds: float
    peak_rss_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class CostFindings:
    """All that the page of costs states.

    `absent` are executions of the pipeline without a cost file; `unused` are cost files that belong to no task and
    release of params.
    """

    releases: tuple[str, ...]
    pairs: tuple[CostPair, ...]
    stages: tuple[StageCost, ...]
    absent: tuple[Execution, ...] = ()
    unused: tuple[Execution, ...] = ()
    published: PublishedCost | None = field(default=None)

    @property
    def total_seconds(self) -> tuple[float, float] | None:
        """Return (porting, re-tuning) seconds over the pairs that have both; None when none has."""
        both = [(p.port.wall_seconds, p.retune.wall_seconds) for p in self.pairs if p.port and p.retune]
        return (sum(p for p, _ in both), sum(r for _, r in both)) if both else None


def find_costs(costs: tuple[Cost, ...], params: Params) -> CostFindings:
    """Return the costs of what `params` describes. Raises DataError where it names no task or no release."""
    require_names(params)
    expected = tuple(executions(params))
    measured = {Execution(cost.stage, cost.release, cost.task): cost for cost in costs}
    return CostFindings(
        releases=params.releases,
        pairs=tuple(_pairs(measured, params)),
        stages=tuple(_stages([measured[one] for one in expected if one in measured])),
        absent=tuple(one for one in expected if one not in measured),
        unused=tuple(one for one in measured if one not in set(expected)),
        published=published_figures(params).cost,
    )


def executions(params: Params) -> Iterator[Execution]:
    """Yield every execution of a measured stage, in the order of the pipeline."""
    first, *later = params.releases
    yield Execution("fetch", first)
    yield from (Execution("evolve", release) for release in later)
    for stage in ("train", "port"):
        yield from (Execution(stage, release, task) for release in params.releases for task in params.tasks)
    yield from (Execution("evaluate", release) for release in params.releases)


def _pairs(measured: dict[Execution, Cost], params: Params) -> Iterator[CostPair]:
    for release in params.releases[1:]:
        for task in params.tasks:
            port, retune = (measured.get(Execution(stage, release, task)) for stage in ("port", "train"))
            if port or retune:
                yield CostPair(release=release, task=task, port=port, retune=retune)


def _stages(costs: list[Cost]) -> Iterator[StageCost]:
    for stage in dict.fromkeys(cost.stage for cost in costs):
        here = [cost for cost in costs if cost.stage == stage]
        peaks = [cost.peak_rss_bytes for cost in here if cost.peak_rss_bytes is not None]
        yield StageCost(
            stage=stage,
            executions=len(here),
            wall_seconds=sum(cost.wall_seconds for cost in here),
            peak_rss_bytes=max(peaks, default=None),
        )
