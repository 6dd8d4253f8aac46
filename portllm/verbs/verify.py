"""`portllm verify DIR`: a ported directory against its port.json and, given base and patch, against arithmetic.

Without base and patch: every file is as it was written, no other weights are there. With them: every tensor that the
patch leaves alone is the base's byte for byte, and a sample of the others is computed again, whole, in float64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import Base
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.files.names import ADAPTER_CONFIG, CONFIG
from portllm.checkpoint.files.progress import ByteMeter, Progress
from portllm.checkpoint.planning.changes import Plan
from portllm.checkpoint.planning.planner import make_plan
from portllm.checkpoint.record.provenance import public_name
from portllm.checkpoint.record.records import PortRecord, Source
from portllm.checkpoint.verification.counterparts import (
    check_adapter_files,
    check_config,
    check_merged_files,
)
from portllm.checkpoint.verification.manifest import Manifest
from portllm.checkpoint.verification.proof import ExpectedTensors, Proof, TensorSample, fitting
from portllm.checkpoint.writing.adapter import adapter_file
from portllm.checkpoint.writing.targets import target_files
from portllm.errors import ParamsError, VerificationError
from portllm.lm.names.layout import open_base


@dataclass(frozen=True)
class VerifyRecord:
    """What was proven of a ported directory; `proof` is None where base and patch were not given."""

    folder: str
    record: PortRecord
    nbytes: int
    sample: TensorSample
    proof: Proof | None = None

    def as_json(self) -> dict[str, Any]:
        """The one JSON object of `verify --json`."""
        record, proof = self.record, self.proof
        return {
            "dir": self.folder, "as": record.output, "fingerprint": record.fingerprint, "files": len(record.files),
            "bytes": self.nbytes, "base": {"fingerprint": record.base.fingerprint},
            "patch": {"fingerprint": record.patch.fingerprint},
            "proof": proof and {
                "tensors": {
                    "identical": proof.identical, "changed": proof.changed, "recomputed": len(proof.recomputed),
                },
                "recomputed": list(proof.recomputed), "too_large": list(proof.too_large), "seed": self.sample.seed,
            },
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The same for people."""
        mark = (self.record.fingerprint or "")[:12]
        lines = [
            f"{self.folder}: {len(self.record.files)} files, {self.nbytes / 1e6:.1f} MB, are as port.json says "
            f"({self.record.algorithm_name} of each; fingerprint {mark}), and no other weights are there"
        ]
        if self.proof is None:
            return [*lines, "not compared with base and patch: pass --onto and --patch to prove the tensors too"]
        proof, whose = self.proof, "base" if self.record.output == "merged" else "patch"
        lines.append(f"{proof.identical} tensors are the {whose}'s, byte for byte")
        if proof.changed:
            some = "" if len(proof.recomputed) == proof.changed else f" (seed {self.sample.seed}; --all takes all)"
            lines.append(
                f"{len(proof.recomputed)} of {proof.changed} changed tensors, computed again in float64 and rounded "
                f"once, are equal in every bit{some}"
            )
        if proof.too_large:
            lines.append(f"{len(proof.too_large)} changed tensors are too large for this machine's memory: left out")
        return lines


def run(
    *,
    folder: Path,
    onto: Path | None = None,
    patch: Path | None = None,
    source: Path | None = None,
    sample: TensorSample | None = None,
    on_progress: Progress | None = None,
) -> VerifyRecord:
    """Verify `folder`; `onto` and `patch` are what it was made from, `source` the patch's own base. Reads only.

    Raises VerificationError at the first difference, CheckpointError, PatchError or ParamsError.
    """
    if (onto is None) != (patch is None) or (source is not None and onto is None):
        raise ParamsError(
            "verify: expected base and patch together (--onto BASE --patch PATCH [--from OLD]) or neither"
        )
    sample = sample or TensorSample()
    if sample.count < 1:
        raise ParamsError(f"verify: sample must be at least 1, found {sample.count}; to take all, pass --all")
    manifest = Manifest.open(folder)
    manifest.check_names()
    stored = sum(header.size for header in manifest.headers())
    inputs = _Inputs.open(manifest, onto, patch, source) if onto is not None and patch is not None else None
    chosen, too_large = inputs.choose(sample) if inputs is not None else ([], [])
    meter = ByteMeter(manifest.nbytes + stored + (inputs.nbytes(chosen) if inputs is not None else 0), on_progress)
    manifest.check_digests(meter)
    manifest.check_fingerprint(meter)
    proof = inputs.prove(chosen, too_large, meter) if inputs is not None else None
    return VerifyRecord(public_name(folder), manifest.record, manifest.nbytes, sample, proof)


@dataclass(frozen=True)
class _Inputs:
    """What a directory is said to be made from, and what making it again would write."""

    manifest: Manifest
    base: Base
    patch: Patch
    old: Base | None
    plan: Plan
    making: ExpectedTensors

    @classmethod
    def open(cls, manifest: Manifest, onto: Path, patch: Path, source: Path | None) -> _Inputs:
        base, lora, folder = open_base(onto), Patch.open(patch), manifest.folder
        old = open_base(source) if source is not None else None
        plan = make_plan(lora, base, scale=manifest.record.scale, old=old)
        if manifest.record.output == "merged":
            files, whose = target_files(plan, base, folder), "base"
        else:
            files, whose = [adapter_file(lora, old, folder)], "patch"
        return cls(manifest, base, lora, old, plan, ExpectedTensors.of(manifest.headers(), files, folder, whose))

    def choose(self, sample: TensorSample) -> tuple[list[str], list[str]]:
        """Names of the tensors to compute again, and of those that no memory is there for."""
        import psutil

        sizes = self.making.recomputable()
        fits = fitting(sizes, psutil.virtual_memory().available)
        return sample.choose(fits) if fits else [], sorted(sizes.keys() - fits.keys())

    def nbytes(self, chosen: list[str]) -> int:
        """How much there is to read: the inputs for their fingerprints, and both sides of every comparison."""
        return self.base.checkpoint.nbytes + self.patch.header.size + self.making.nbytes(chosen)

    def prove(self, chosen: list[str], too_large: list[str], meter: ByteMeter) -> Proof:
        """Raise VerificationError where the inputs are others than port.json's, or the files not what they make."""
        record = self.manifest.record
        self._same("--onto", self.base.path, record.base)
        meter.add(self.base.checkpoint.nbytes)
        self._same("--patch", self.patch.path, record.patch)
        meter.add(self.patch.header.size)
        if self.old is not None and record.trained_on is not None:
            self._same("--from", self.old.path, record.trained_on)
        for name, path in ((CONFIG, self.base.path), (ADAPTER_CONFIG, self.patch.path)):
            check_config(self.manifest, name, path)
        self.making.check_headers()
        if record.output == "merged":
            check_merged_files(self.manifest, self.base, self.patch, self.plan)
        else:
            check_adapter_files(self.manifest, self.patch)
        proof = self.making.prove(chosen, meter)
        return dataclasses.replace(proof, too_large=tuple(too_large))

    def _same(self, flag: str, path: Path, recorded: Source) -> None:
        if recorded.fingerprint is None:
            return
        found = fingerprint(path)
        if found != recorded.fingerprint:
            raise VerificationError(
                f"{path}: has fingerprint {found[:12]}, {self.manifest.folder / PortRecord.FILE} names {recorded.name} "
                f"with fingerprint {recorded.fingerprint[:12]}; pass that one as {flag}"
            )
