"""A name is a local directory or a repository of the hub at one commit, of which the files needed are downloaded.

All against a stand-in of the hub's HTTP API.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import CheckpointError, OutputError, PortllmError, UnsafeFileError
from portllm.lm.remote import downloading
from portllm.lm.remote.hub import resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # the hub's library warns of its own affairs

REPO = "owner/name"
PIECE = 1 << 14  # bytes that the hub's library writes at a time, here
LARGE = bytes(range(256)) * 4096  # 1 MiB
MODEL: Mapping[str, bytes] = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "README.md": b"# a model\n",
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.model": b"\x00words",
    "additional_chat_templates/tools.jinja": b"{{ x }}",
    "model.safetensors": LARGE,
}
LEFT: Mapping[str, bytes] = {
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.safetensors": b"again",
    "consolidated.safetensors.index.json": b"{}",
    "original/params.json": b"{}",
    "original/model.safetensors": b"again",
    "onnx/config.json": b"{}",
    "model-q4.gguf": b"again",
    "model.fp16.safetensors": b"again",
    "modeling_own.py": b"code",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wanted(files: Mapping[str, bytes] = MODEL) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def test_resolve_of_a_directory_returns_it(hub: Any, tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert hub.asked == []


@pytest.mark.parametrize("name", ["no such thing", "/absent/dir", "./absent", "a/b/c", ""])
def test_a_name_that_is_neither_is_refused(hub: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(name)
    assert hub.asked == []


def test_only_files_that_a_model_loads_are_downloaded(hub: Any) -> None:
    commit = hub.add(REPO, {**MODEL, **LEFT})
    folder = resolve(REPO)
    assert contents(folder) == wanted()
    assert folder.name == commit
    assert hub.store_tokens == {None}, "the token is the hub's alone"


def test_an_adapter_and_a_complete_repository_are_downloaded(hub: Any) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": LARGE, "optimizer.pt": b"pickle"}
    hub.add(REPO, adapter)
    assert set(contents(resolve(REPO))) == {"adapter_config.json", "adapter_model.safetensors"}
    hub.add("owner/other", {**MODEL, **LEFT})
    whole = set(contents(resolve("owner/other", whole=True)))
    assert whole == {*MODEL, *LEFT} - {"pytorch_model.bin"}


def test_shards_are_those_of_the_index(hub: Any) -> None:
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    shards = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}
    sharded = {"config.json": b"{}", "model.safetensors.index.json": index, **shards}
    hub.add(REPO, {**sharded, "model-00001-of-00001.safetensors": b"stale"})
    assert contents(resolve(REPO)) == sharded
    hub.add("owner/torn", {name: content for name, content in sharded.items() if "00002-of" not in name})
    with pytest.raises(CheckpointError, match="names model-00002-of-00002.safetensors, which the repository lacks"):
        resolve("owner/torn")
    hub.add("owner/twice", {**sharded, "model.safetensors": b"another"})
    with pytest.raises(CheckpointError, match="contradict each other"):
        resolve("owner/twice")
    hub.add("owner/bad", {**sharded, "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'})
    with pytest.raises(UnsafeFileError, match="do not trust it"):
        resolve("owner/bad")


def test_pickles_alone_are_refused_with_the_command_that_converts_them(hub: Any) -> None:
    commit = hub.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(UnsafeFileError) as caught:
        resolve(REPO)
    assert f"{REPO} {commit} NEW_DIR" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.asked_for("/resolve/") == 0
    hub.add("owner/gguf", {"model.gguf": b"weights"})
    with pytest.raises(CheckpointError, match="expected safetensors that a model loads from, found model.gguf"):
        resolve("owner/gguf")


def test_a_branch_is_pinned_and_a_commit_does_not_change(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = hub.add(REPO, MODEL)
    assert resolve(REPO).name == old
    changed = {**MODEL, "config.json": b'{"new": 1}'}
    new = hub.add(REPO, changed)
    assert contents(resolve(REPO)) == wanted(changed)
    assert contents(resolve(f"{REPO}@{old}")) == wanted()
    hub.add(REPO, MODEL, branch="v1.2")
    assert resolve(f"{REPO}@v1.2").name == old
    # without the hub, the cache knows what each name stood for
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert {name: resolve(f"{REPO}{name}").name for name in ("", "@main", "@v1.2", f"@{old}")} == {
        "": new, "@main": new, "@v1.2": old, f"@{old}": old,
    }  # fmt: skip
    assert len(hub.asked) == asked


def test_cached_files_are_not_downloaded_again(hub: Any) -> None:
    hub.add(REPO, MODEL)
    plans: list[Any] = []
    resolve(REPO, on_plan=lambda plan: plans.append((len(plan.files), plan.nbytes, plan.present)))
    hub.add(REPO, {**MODEL, "config.json": b'{"new": 1}'})
    heard: list[tuple[int, int]] = []
    resolve(
        REPO,
        on_plan=lambda plan: plans.append((plan.nbytes, plan.present)),
        on_progress=lambda *done: heard.append(done),
    )
    total = sum(map(len, wanted().values()))
    assert plans == [(6, total, 0), (total - 2 + 10, total - 2)]
    assert heard[0] == (total - 2, total + 8)
    assert heard[-1] == (total + 8, total + 8)
    assert [first for _, first in hub.ranges] == [0]


def test_progress_is_in_bytes_and_ends_at_the_total(hub: Any) -> None:
    hub.add(REPO, MODEL)
    heard: list[tuple[int, int]] = []
    resolve(REPO, on_progress=lambda *done: heard.append(done))
    total = sum(map(len, wanted().values()))
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert {one for _, one in heard} == {total}
    assert heard[-1] == (total, total)


def test_resolve_with_a_callback_draws_no_bars_of_the_library(hub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add(REPO, MODEL)
    resolve(REPO, on_progress=lambda *_: None)
    assert capsys.readouterr().err == ""


def test_a_broken_connection_is_resumed(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library waits between its attempts
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", PIECE)
    hub.add(REPO, MODEL)
    hub.cuts = [300_000, 200_000]
    assert contents(resolve(REPO)) == wanted()
    firsts = [first for _, first in hub.ranges]
    assert firsts[0] == 0
    assert len(firsts) == 3
    assert 300_000 - PIECE < firsts[1] < 310_000
    assert 200_000 - PIECE < firsts[2] - firsts[1] < 210_000


def test_a_file_with_another_hash_is_removed(hub: Any) -> None:
    hub.add(REPO, MODEL)
    hub.spoils = hashlib.sha256(LARGE).hexdigest()
    with pytest.raises(CheckpointError, match=r"model\.safetensors did not arrive as the hub has it"):
        resolve(REPO)
    hub.spoils = None
    assert contents(resolve(REPO)) == wanted()


def test_a_file_that_arrives_short_is_refused_without_its_signed_address(hub: Any) -> None:
    hub.add(REPO, MODEL)
    hub.store[hashlib.sha256(LARGE).hexdigest()] = LARGE[:-5]
    with pytest.raises(CheckpointError, match="did not arrive complete; check the network") as error:
        resolve(REPO)
    assert "secret" not in str(error.value)


def test_a_partly_cached_repository_is_not_complete(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, {**MODEL, "port.json": b"{}", "notes.xyz": b"by hand"})
    folder = resolve(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(REPO) == folder
    with pytest.raises(CheckpointError, match="nor complete in the hub's cache"):
        resolve(REPO, whole=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    resolve(REPO, whole=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(REPO, whole=True) == folder


def start(hub: Any, home: Path) -> subprocess.Popen[str]:
    """`resolve` in a process of its own."""
    code = (
        f"from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = {PIECE}; "
        f"from portllm.lm.remote.hub import resolve; print(resolve({REPO!r}))"
    )
    env = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    env.pop("HF_HUB_CACHE", None)
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def test_a_killed_download_runs_again_and_keeps_complete_files(hub: Any, tmp_path: Path) -> None:
    shards = {"model-00001-of-00002.safetensors": LARGE, "model-00002-of-00002.safetensors": LARGE * 2}
    index = json.dumps({"weight_map": {name: name for name in shards}}).encode()
    hub.add(REPO, {"config.json": b"{}", "model.safetensors.index.json": index, **shards})
    hub.stalls_at = 1_500_000
    first = start(hub, tmp_path)
    complete = [hashlib.sha256(shards["model-00001-of-00002.safetensors"]).hexdigest()]
    deadline = time.monotonic() + 60
    while len(hub.ranges) < 2 or not any(path.name in complete for path in tmp_path.rglob("*")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    hub.stalls_at = None
    hub.ranges.clear()
    second = start(hub, tmp_path)
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    folder = Path(printed.strip())
    assert {name: (folder / name).read_bytes() for name in shards} == shards
    assert {name for name, _ in hub.ranges}.isdisjoint(complete)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda h: None, r"neither a directory nor a repository of the hub that your token can read; check the name"),
        (
            lambda h: h.add(REPO, MODEL, gated=True),
            r"gated, and this token's account has no access; request .*owner/name",
        ),
        (lambda h: h.add(REPO, MODEL, branch="other"), r"has no revision main; see its branches at"),
        (lambda h: h.known_tokens.clear(), r"the token is unknown to the hub, or has expired; log in again"),
        (lambda h: h.failures.update({"/api/models": (503, "down")}), r"the hub failed \(HTTP 503\); try again later"),
        (lambda h: h.failures.update({"/api/models": (429, "slow")}), r"too many requests \(HTTP 429\)"),
        (lambda h: (h.add(REPO, MODEL), h.failures.update({"/store/": (403, "expired")})), r"refused \(HTTP 403\)"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(
    hub: Any, prepare: Any, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    prepare(hub)
    with caplog.at_level(logging.DEBUG), pytest.raises(CheckpointError, match=says) as caught:
        resolve(REPO)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{REPO}: ")
    assert os.environ["HF_TOKEN"] not in str(caught.value) + caplog.text
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "signature=secret" not in f"{caught.value} {loud}"


def test_a_refusal_without_a_token_names_the_login(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match=r"without a token \(`hf auth login`\); check the name"):
        resolve(REPO)
    hub.add(REPO, MODEL, gated=True)
    with pytest.raises(CheckpointError, match=rf"gated; accept its terms at {hub.url}/owner/name, then log in"):
        resolve(REPO)
    monkeypatch.setenv("HF_TOKEN", next(iter(hub.known_tokens)))
    hub.grants.add(REPO)
    assert contents(resolve(REPO)) == wanted()


def test_without_the_hub_only_a_complete_cache_is_used(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add(REPO, MODEL)
    hub.add("owner/partly", {**MODEL, "model.safetensors": LARGE + b"more"})
    folder = resolve(REPO)
    hub.failures["/store/"] = (500, "down")
    with pytest.raises(CheckpointError, match="HTTP 500"):
        resolve("owner/partly")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert resolve(REPO) == folder
    for name in ("owner/partly", "owner/never", f"{REPO}@v9"):
        with pytest.raises(CheckpointError, match="cannot be reached .* not complete in the cache; check the network"):
            resolve(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(REPO) == folder
    for name in ("owner/partly", "owner/never", f"{REPO}@v9"):
        with pytest.raises(CheckpointError, match=r"nor complete in the hub's cache.*HF_HUB_OFFLINE.*local directory"):
            resolve(name)


def test_a_disk_too_small_is_refused_before_the_download(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, MODEL)
    monkeypatch.setattr(downloading.Download, "free", property(lambda _: 50_000_000))
    with pytest.raises(OutputError, match=r"1\.05 MB are to be downloaded, .* has 50\.0 MB free"):
        resolve(REPO)
    assert hub.ranges == []


@pytest.mark.parametrize("revision", ["../../../escape", "a/../../../../escape"])
def test_no_revision_writes_outside_the_cache(hub: Any, revision: str, tmp_path: Path) -> None:
    hub.add(REPO, MODEL, branch=revision)
    before = {path for path in tmp_path.parent.rglob("escape")}
    with contextlib.suppress(PortllmError):
        resolve(f"{REPO}@{revision}")
    assert {path for path in tmp_path.parent.rglob("escape")} == before
