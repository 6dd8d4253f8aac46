"""The metrics of the world's tasks, for the harness's `process_results`: plain functions of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

INVALID = "[invalid]"  # the answer of the harness's regex filter where nothing matches


def multiple_choice(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return acc: the right choice is the likeliest; format: one of the choices is the model's greedy continuation.

    `results` has (log-likelihood, is greedy) per choice; `doc["label"]` or `doc["answer"]` is the
    index of the right one.
    """
    gold = int(doc["label"] if "label" in doc else doc["answer"])
    likelihoods = [likelihood for likelihood, _ in results]
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    return {"acc": float(best == gold), "format": float(any(greedy for _, greedy in results))}


def generated_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return exact_match: the number after `####` is right; format: there is one. `results` has the filtered answer."""
    answer = str(results[0])
    gold = str(doc["answer"]).rpartition("####")[2].strip()
    return {"exact_match": float(answer == gold), "format": float(answer != INVALID)}


def recall(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return acc: the fact is the model's greedy continuation; overall, and for the document's kind."""
    ((_, greedy),) = results
    return {"acc": float(greedy), f"acc_{doc['kind']}": float(greedy)}


BY_TASK = {
    "world_boolq": multiple_choice,
    "world_sst2": multiple_choice,
    "world_mrpc": multiple_choice,
    "world_gsm8k": generated_number,
    "world_recall": recall,
}
