"""A name is a directory where there is one, else a repository of the hub: of its files, only what is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portllm.errors import CheckpointError
from portllm.lm.hub import resolve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What huggingface_hub was asked to download."""
    calls: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_a_directory_is_itself(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert asked == []


def test_a_model_comes_without_what_it_does_not_load_from(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    assert resolve("owner/name@v1.2") == tmp_path / "snapshot"
    (call,) = asked
    assert (call["repo"], call["revision"]) == ("owner/name", "v1.2")
    assert "*.safetensors" in call["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in call["allow_patterns"])


def test_a_whole_repository_comes_without_pickles(asked: list[dict[str, Any]]) -> None:
    resolve("owner/name", whole=True)
    assert asked[0]["allow_patterns"] is None
    assert "*.bin" in asked[0]["ignore_patterns"]


@pytest.mark.parametrize("name", ["no such thing", "/absent/dir", "./absent", "a/b/c", ""])
def test_what_is_neither_is_refused(asked: list[dict[str, Any]], name: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(name)
    assert asked == []
