"""What each arm costs: re-tuning a patch on a release beside porting the old one onto it."""

from __future__ import annotations

from dataclasses import dataclass

from portllm.reporting.evidence import Cost, Evidence


@dataclass(frozen=True, kw_only=True)
class CostPair:
    """One task on one release after the first; None where the stage left no cost file."""

    release: str
    task: str
    port: Cost | None
    retune: Cost | None

    @property
    def speedup(self) -> float | None:
        """Seconds of re-tuning over seconds of porting."""
        if self.port is None or self.retune is None or self.port.wall_seconds <= 0:
            return None
        return self.retune.wall_seconds / self.port.wall_seconds


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """A whole stage: executions, their summed seconds, the largest peak."""

    stage: str
    executions: int
    wall_seconds: float
    peak_rss_bytes: int | None


def pairs(evidence: Evidence) -> tuple[CostPair, ...]:
    """Every release after the first × task that has a cost of porting or of re-tuning."""
    by_place = {(c.stage, c.release, c.task): c for c in evidence.costs}
    found = (
        CostPair(
            release=release,
            task=task,
            port=by_place.get(("port", release, task)),
            retune=by_place.get(("train", release, task)),
        )
        for release in evidence.releases[1:]
        for task in evidence.tasks
    )
    return tuple(pair for pair in found if pair.port or pair.retune)


def stages(evidence: Evidence) -> tuple[StageCost, ...]:
    """Each stage's total, in the order of the pipeline."""
    order = ("prepare", "fetch", "evolve", "train", "port", "evaluate")
    names = sorted({c.stage for c in evidence.costs}, key=lambda s: (order.index(s) if s in order else len(order), s))
    return tuple(_stage(name, [c for c in evidence.costs if c.stage == name]) for name in names)


def _stage(name: str, costs: list[Cost]) -> StageCost:
    peaks = [c.peak_rss_bytes for c in costs if c.peak_rss_bytes is not None]
    return StageCost(
        stage=name,
        executions=len(costs),
        wall_seconds=sum(c.wall_seconds for c in costs),
        peak_rss_bytes=max(peaks, default=None),
    )
