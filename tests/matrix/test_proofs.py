"""Verify proves a port of every kind of edit from scratch, and detects one element moved by its last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checkpoint.files import hashing as fingerprint
from portllm.checkpoint.verification.proof import TensorSample
from portllm.errors import VerificationError
from portllm.params import PortParams
from portllm.verbs import port, verify
from tests.matrix.cases import CASES
from tests.matrix.judge import NEW, OLD, Bench, Case

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of their own affairs

# one for each way a tensor is written
CHOSEN = {
    "llama-patterns+rslora+dora", "llama-pissa+rslora", "llama-tied-embedding+head", "llama-save-both-grown",
    "llama-tied-tokens-apart", "qwen2-lora_bias", "qwen2-bias-all", "gpt2-dora", "gpt2-hub-save-head",
    "mixtral-attention+experts+router", "gpt_oss-experts", "t5-linears",
}  # fmt: skip
ALL = TensorSample(everything=True)


def forge(folder: Path) -> None:
    """Make port.json agree with the directory as it is now."""
    tree = json.loads((folder / "port.json").read_text())
    tree["files"] = {name: fingerprint.file_digest(folder / name, "blake3") for name in tree["files"]}
    tree["fingerprint"] = fingerprint.fingerprint(folder)
    (folder / "port.json").write_text(json.dumps(tree))


def nudge(folder: Path, tensor: str) -> None:
    """Move one element of `tensor` to its neighbour."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            flat = tensors[tensor].view(-1)
            flat[len(flat) // 2] = torch.nextafter(flat[len(flat) // 2], torch.tensor(torch.inf, dtype=flat.dtype))
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in CHOSEN], ids=str)
def test_every_kind_of_edit_is_proven(case: Case, bench: Bench, tmp_path: Path) -> None:
    patch = bench.patch(case, tmp_path / "patch", copies=case.copies)
    inputs = {"onto": bench.base(case.architecture, NEW), "patch": patch}
    inputs["source"] = bench.base(case.architecture, OLD) if case.source else None
    for output in ("merged", "adapter"):
        port.run(**inputs, out=tmp_path / output, params=PortParams(as_=output))
        proof = verify.run(folder=tmp_path / output, **inputs, sample=ALL).proof
        assert proof is not None
        assert len(proof.recomputed) == proof.changed
        assert proof.changed > 0 or output == "adapter"
        assert proof.identical > 0 or (output == "adapter" and case.residual)
        for tensor in proof.recomputed[:1]:
            nudge(tmp_path / output, tensor)
            forge(tmp_path / output)
            with pytest.raises(VerificationError, match=f"tensor {tensor}: element"):
                verify.run(folder=tmp_path / output, **inputs, sample=ALL)


def test_the_chosen_cases_exist() -> None:
    assert {str(case) for case in CASES} >= CHOSEN
