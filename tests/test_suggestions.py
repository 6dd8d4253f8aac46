"""The nearest known name at the end of an error message."""

from __future__ import annotations

from pathlib import Path

import pytest

from portllm.errors import CheckpointError
from portllm.lm.remote.hub import resolve
from portllm.suggestions import did_you_mean_path, nearest, nearest_path


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models/releases/v0 and models/releases/v1, the hub switched off."""
    for release in ("v0", "v1"):
        (tmp_path / "models" / "releases" / release).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_nearest_without_a_like_name_returns_none() -> None:
    assert nearest("tickts", ["tickets", "boolq"]) == "tickets"
    assert nearest("tickets", ["boolq"]) is None


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("modles/relases/v0", "models/releases/v0"),
        ("models/release/v1", "models/releases/v1"),
        ("modles", "models"),
        ("models/zzz", None),
        ("models/releases/v0", None),
    ],
)
def test_nearest_path_with_misspelt_parts_corrects_each(tree: Path, path: str, near: str | None) -> None:
    assert nearest_path(Path(path)) == (near and Path(near))
    assert nearest_path(tree / path) == (near and tree / near)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("models/relases/v0", "did you mean models/releases/v0?"),
        ("./modle", "did you mean models?"),
        ("modles", "did you mean models?"),
        ("model/releases", "did you mean models/releases?"),
        ("models/zzz", "models contains releases"),
        ("models/releases/zzz", "models/releases contains v0, v1"),
    ],
)
def test_resolve_of_a_misspelt_path_names_the_nearest(tree: Path, name: str, hint: str) -> None:
    """issue 8, item 14: it was called neither a directory nor in the hub's cache, and the hub out of reach."""
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"{name}: no such directory")
    assert hint in str(caught.value)
    assert "out of reach" not in str(caught.value)


def test_resolve_of_an_absolute_path_names_the_nearest(tree: Path) -> None:
    """issue 8, item 14."""
    with pytest.raises(CheckpointError, match=r"no such directory.*did you mean .*/models/releases/v1\?"):
        resolve(tree / "models" / "realeses" / "v1")


def test_resolve_of_a_hub_id_without_a_like_directory_keeps_the_hubs_reason(tree: Path) -> None:
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        resolve("owner/name")
    assert did_you_mean_path(Path("owner/name")) == ""
