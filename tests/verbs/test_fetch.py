"""fetch: a published release, of the hub at one commit or of a directory, is complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from portllm.amounts import size
from portllm.checkpoint.base import copying
from portllm.checkpoint.files import copying as file_copying
from portllm.checkpoint.files import output
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.record.records import ReleaseRecord
from portllm.cli import main
from portllm.errors import CheckpointError, OutputError
from portllm.lm.remote.releases import DownloadCallbacks
from portllm.params import FetchParams
from portllm.verbs import fetch

pytestmark = pytest.mark.filterwarnings("ignore")  # the hub's library warns of its own affairs

REPO = "owner/name"


@pytest.fixture
def published(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    """A base in two shards, as its makers publish it, and what a model does not load from."""
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(11, 8), "lm_head.weight": torch.randn(11, 8)}
    names = sorted(tensors)
    folder = make_checkpoint(tmp_path / "published", tensors, shards=[names[:1], names[1:]])
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wanted(published: Path) -> dict[str, bytes]:
    return {k: v for k, v in contents(published).items() if not k.startswith(("pytorch_model", "consolidated"))}


def fetched(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if name != ReleaseRecord.FILE}


def test_a_hub_release_is_pinned_to_its_commit(hub: Any, published: Path, tmp_path: Path) -> None:
    commit = hub.add(REPO, contents(published))
    out = tmp_path / "v0"
    notes: list[str] = []
    progress: list[tuple[int, int]] = []
    callbacks = DownloadCallbacks(on_note=notes.append, on_bytes=lambda *counts: progress.append(counts))
    record = fetch.run(out=out, params=FetchParams(source=REPO), download=callbacks)
    assert fetched(out) == wanted(published)
    assert record == ReleaseRecord.read(out)
    assert record.source is not None
    assert (record.source.name, record.source.revision) == (REPO, commit)
    assert record.source.fingerprint == record.fingerprint == fingerprint(published)
    assert (record.base, dict(record.params)) == (None, {"source": REPO})
    total = sum(map(len, wanted(published).values()))
    (note,) = notes
    assert note.startswith(f"{REPO} at {commit[:12]}: 5 files, {size(total)}; ")
    assert note.endswith("GB free on the disk of the hub's cache")
    assert progress[-1] == (total, total)
    again = DownloadCallbacks(on_note=notes.append)
    fetch.run(out=out, params=FetchParams(source=REPO), download=again, force=True)
    assert f"{size(total)}, all of it available already; " in notes[-1]
    # the branch moves on, the commit does not
    hub.add(REPO, {**contents(published), "tokenizer.json": b'{"new": 1}'})
    fetch.run(out=tmp_path / "again", params=FetchParams(source=f"{REPO}@{commit}"))
    assert fetched(tmp_path / "again") == wanted(published)


def test_the_command_prints_the_download_and_no_token(
    hub: Any, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    commit = hub.add(REPO, contents(published))
    words = ["--no-track", "fetch", REPO, "--out", str(tmp_path / "v0"), "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["source"]["revision"] == commit
    assert f"fetch: {REPO} at {commit[:12]}: 5 files, " in done.stderr
    other = CliRunner().invoke(main, ["--no-track", "fingerprint", f"{REPO}@{commit}"])
    assert fingerprint(published) in other.stdout
    hub.repos[REPO]["gated"] = True
    hub.add(REPO, {**contents(published), "config.json": b'{"new": 1}'})
    failed = CliRunner().invoke(main, [*words, "--force"])
    assert failed.exit_code == 1
    last = failed.stderr.splitlines()[-1]
    assert last == (
        f"Error: {REPO}: gated, and this token's account has no access; request it at {hub.url}/{REPO}, "
        "or use another token"
    )
    assert os.environ["HF_TOKEN"] not in done.output + failed.output
    assert fetched(tmp_path / "v0") == wanted(published), "what was there stays"


def test_a_copied_directory_is_complete_or_absent(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(published)
    record = fetch.run(out=tmp_path / "v0", params=FetchParams(source=str(published)))
    assert fetched(tmp_path / "v0") == wanted(published)
    assert record.source is not None
    assert (record.source.name, record.source.revision) == ("published", None)
    assert str(tmp_path) not in (tmp_path / "v0" / ReleaseRecord.FILE).read_text()
    with pytest.raises(OutputError, match="--force"):
        fetch.run(out=tmp_path / "v0", params=FetchParams(source=str(published)))
    with pytest.raises(OutputError, match="overlaps the input"):
        fetch.run(out=published / "inside", params=FetchParams(source=str(published)))
    monkeypatch.setattr(output, "MARGIN_BYTES", 1 << 60)
    monkeypatch.setattr(copying, "clone", lambda *_: False)
    with pytest.raises(OutputError, match="the next file needs"):
        fetch.run(out=tmp_path / "v1", params=FetchParams(source=str(published)))
    (published / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        fetch.run(out=tmp_path / "v1", params=FetchParams(source=str(published)))
    assert not (tmp_path / "v1").exists()
    del before["model-00002-of-00002.safetensors"]
    assert contents(published) == before


def test_an_existing_out_is_refused_before_any_request(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "v0").mkdir()
    (tmp_path / "v0" / "file").write_text("1")
    with pytest.raises(OutputError, match="--force"):
        fetch.run(out=tmp_path / "v0", params=FetchParams(source="owner/absent"))
    assert hub.asked == []


@pytest.mark.parametrize("way", ["clone", "kernel", "memory"])
def test_every_way_of_copying_gives_the_same_bytes(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way != "clone":
        monkeypatch.setattr(copying, "clone", lambda *_: False)
    if way == "memory":

        def refuse(*_: Any) -> int:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr("os.copy_file_range", refuse)
    monkeypatch.setattr(file_copying, "KERNEL_BYTES", 100)
    progress: list[tuple[int, int]] = []
    out = tmp_path / "out"
    out.mkdir()
    link = tmp_path / "snapshot"
    link.mkdir()
    for path in published.iterdir():
        (link / path.name).symlink_to(path)  # as a hub cache has it
    copying.copy_checkpoint(link, out, lambda *counts: progress.append(counts))
    assert contents(out) == wanted(published)
    assert not any(path.is_symlink() for path in out.iterdir())
    total = sum(map(len, wanted(published).values()))
    assert progress[-1] == (total, total)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
