"""A fabricated project: every directory as it is after the stages before report."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from portllm.checkpoint.record.records import ReleaseRecord
from portllm.params import EvolveParams, Params, ReleaseParams, ReportParams
from portllm.verbs import report

TASKS = ("world_boolq", "world_sst2", "world_mrpc", "world_gsm8k")
# chance of a right answer: base, tuned or retuned, ported
SKILL = {"world_boolq": (0.5, 0.95, 0.85), "world_sst2": (0.52, 0.99, 0.97), "world_mrpc": (0.5, 0.98, 0.96)}
ARITHMETIC = (0.02, 0.8, 0.62)
RECALL = {
    "base": (0.99, 0.97, 0.98),
    "retuned": (0.97, 0.96, 0.97),
    "ported": (0.92, 0.9, 0.95),
    "old": (0.03, 0.02, 0.96),
}
PERPLEXITY = {"base": 2.1, "retuned": 2.2, "ported": 2.3, "old": 5.3}


class Tree:
    """A project directory after every stage before report, small and seeded."""

    def __init__(
        self, root: Path, *, tasks: Sequence[str] = TASKS, releases: Sequence[str] = ("v0", "v1", "v2"),
        retuned: bool = True, layers: int = 2, rows: int = 60, kinds: Sequence[str] = ("q_proj", "v_proj"),
    ) -> None:  # fmt: skip
        self.root, self.tasks, self.releases = root, tuple(tasks), tuple(releases)
        self.retuned, self.rows = retuned, rows
        self.layers, self.kinds = layers, tuple(kinds)
        self.random = random.Random(0)
        torch.manual_seed(0)
        recipes = {r: ReleaseParams(base=self.releases[i]) for i, r in enumerate(releases[1:])}
        self.params = Params(
            tasks=self.tasks,
            releases=self.releases,
            evolve=EvolveParams(releases=recipes),
            report=ReportParams(bootstrap_samples=200),
        )
        self._releases()
        self._patches()
        self._evaluations()
        self._costs()

    def paths(self, **changes: Path) -> dict[str, Path]:
        results = self.root / "results"
        known = {
            "models": self.root / "models",
            "evaluated": results / "evaluate",
            "out": results / "report",
            "metrics": results / "metrics.json",
            "plots": results / "plots",
        }
        return {**known, **changes}

    @property
    def costs(self) -> Path:
        return self.root / "results" / "cost"

    def run(self, **options: Any) -> report.ReportRecord:
        return report.run(params=self.params, **self.paths(), **options)

    def release(self, name: str) -> Path:
        return self.root / "models" / "releases" / name

    def _releases(self) -> None:
        shapes = {"model.embed_tokens.weight": (12, 8), "lm_head.weight": (12, 8), "model.norm.weight": (8,)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.self_attn.{kind}.weight": (8, 8) for kind in self.kinds}
            shapes[f"model.layers.{layer}.input_layernorm.weight"] = (8,)
        weights = {name: torch.randn(shape) for name, shape in shapes.items()}
        for i, name in enumerate(self.releases):
            folder = self.release(name)
            folder.mkdir(parents=True)
            drift = 0.1 if i else 0.0
            weights = {key: w + drift * torch.rand(()) * torch.randn_like(w) for key, w in weights.items()}
            save_file(weights, folder / "model.safetensors")
            (folder / "config.json").write_text('{"model_type": "llama"}')
            probe = {task: 0.97 - 0.02 * i for task in self.tasks}
            ReleaseRecord(fingerprint=f"{i:064x}", probe=probe).write(folder)

    def _patches(self) -> None:
        for release in self.releases if self.retuned else self.releases[:1]:
            for task in self.tasks:
                folder = self.root / "models" / "patches" / release / task
                folder.mkdir(parents=True)
                tensors = {}
                for layer in range(self.layers):
                    for kind in self.kinds:
                        name = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
                        tensors[f"{name}.lora_A.weight"] = torch.randn(2, 8)
                        tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(8, 2)
                save_file(tensors, folder / "adapter_model.safetensors")
                config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(self.kinds)}
                (folder / "adapter_config.json").write_text(json.dumps(config))
                losses = (3.2 * 0.75**step + self.random.uniform(0.02, 0.06) for step in range(20))
                lines = [f"{10 * step + 1},{loss:.5f},0.004" for step, loss in enumerate(losses)]
                (folder / "history.csv").write_text("\n".join(["step,loss,learning_rate", *lines]) + "\n")

    def _evaluations(self) -> None:
        (self.root / "results" / "evaluate").mkdir(parents=True)
        for i, release in enumerate(self.releases):
            results, samples = [], []
            for task in self.tasks:
                base, best, ported = SKILL.get(task, ARITHMETIC)
                arms = (
                    {"base": base, "tuned": best, "ported": ported - 0.05 * i} if i else {"base": base, "tuned": best}
                )
                if i and not self.retuned:
                    del arms["tuned"]
                for arm, skill in arms.items():
                    rows = [self._sample(task, arm, doc, skill) for doc in range(self.rows)]
                    results.append(self._result(task, arm, rows))
                    samples += rows
                if not i:
                    rows = [{**row, "arm": "ported"} for row in rows]
                    results.append(self._result(task, "ported", rows))
                    samples += rows
            if i:
                results += self._knowledge(f"world_{release}")
            write_evaluation(self.root, release, results, samples)

    def _sample(self, task: str, arm: str, doc: int, skill: float) -> dict[str, Any]:
        # an example is easy or hard for every arm alike, so that pairing says something
        ease = random.Random(f"{task}{doc}").random() * 0.9 + self.random.random() * 0.1
        row = {"task": task, "arm": arm, "patch_task": None if arm == "base" else task, "doc_id": doc}
        return {**row, "correct": ease < skill, "answer": "yes", "target": "yes"}

    def _result(self, task: str, arm: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        share = sum(row["correct"] for row in rows) / len(rows)
        name = "exact_match,strict-match" if "gsm8k" in task else "acc,none"
        patch = None if arm == "base" else f"models/{arm}/{task}"
        return {
            "task": task, "patch": patch, "arm": arm, "patch_task": patch and task,
            "metrics": {name: share, f"format,{name.partition(',')[2]}": 0.995}, "samples": len(rows),
        }  # fmt: skip

    def _knowledge(self, corpus: str) -> list[dict[str, Any]]:
        rows = []
        arms = [("base", None)] + [(arm, t) for t in self.tasks for arm in ("tuned", "ported", "old")]
        for arm, task in arms:
            recall = RECALL["retuned" if arm == "tuned" else arm]
            noise = self.random.uniform(0.9, 1.0)
            kinds = {
                f"acc_{kind},none": share * noise
                for kind, share in zip(("changed", "new", "kept"), recall, strict=True)
            }
            perplexity = PERPLEXITY["retuned" if arm == "tuned" else arm] / noise
            shared = {"patch": None, "arm": arm, "patch_task": task, "samples": 50}
            rows.append({"task": f"{corpus}_recall", "metrics": {**kinds, "acc,none": sum(recall) / 3}, **shared})
            rows.append({"task": f"{corpus}_perplexity", "metrics": {"word_perplexity,none": perplexity}, **shared})
        return rows

    def _costs(self) -> None:
        for release in self.releases:
            for task in self.tasks:
                for stage, took, peak in (("train", 14.0, 800), ("port", 3.0, 300)):
                    if stage == "train" and release != self.releases[0] and not self.retuned:
                        continue
                    folder = self.root / "results" / "cost" / stage
                    folder.mkdir(parents=True, exist_ok=True)
                    cost = {
                        "stage": stage, "release": release, "task": task, "wall_seconds": took + self.random.random(),
                        "peak_rss_bytes": (peak + self.random.randrange(40)) * 2**20,
                        "trainable_parameters": 20480 if stage == "train" else 0,
                    }  # fmt: skip
                    (folder / f"{release}-{task}.json").write_text(json.dumps(cost))


def write_evaluation(root: Path, release: str, results: Sequence[Any], samples: Sequence[Any]) -> None:
    folder = root / "results" / "evaluate"
    tree = {"schema_version": 1, "release": release, "model": {}, "results": results}
    (folder / f"{release}.json").write_text(json.dumps(tree))
    pq.write_table(pa.Table.from_pylist(list(samples)), folder / f"{release}.samples.parquet")


@pytest.fixture(scope="session")
def fabricate() -> type[Tree]:
    """`fabricate(root, …)` writes the project below `root`."""
    return Tree
