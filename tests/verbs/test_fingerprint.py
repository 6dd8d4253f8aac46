"""`portllm fingerprint DIR`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from portllm.errors import CheckpointError
from portllm.verbs import fingerprint


def test_prints_the_identity_of_the_tensors(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    one = make_checkpoint(tmp_path / "one", {"a": torch.ones(2), "b": torch.zeros(3)})
    two = make_checkpoint(tmp_path / "two", {"a": torch.ones(2), "b": torch.zeros(3)}, shards=[["b"], ["a"]])
    assert fingerprint.run(path=one) == fingerprint.run(path=two)


def test_a_directory_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint or patch directory"):
        fingerprint.run(path=tmp_path / "nowhere")
