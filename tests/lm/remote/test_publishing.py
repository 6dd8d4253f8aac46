"""A push uploads every file byte for byte, or fails in one line and leaves OUT complete; no token is printed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import portllm
from portllm import api
from portllm.checkpoint.record.records import PortRecord
from portllm.cli import main
from portllm.errors import HubError, OutputError, ParamsError, VerificationError
from portllm.verbs import port as port_verb

pytestmark = pytest.mark.filterwarnings("ignore")  # the hub's library warns of its own affairs

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def inputs(
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    make_patch: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What to port, and to where; no file but OUT holds a safetensors the patch did not change."""
    torch.manual_seed(0)
    tensors = {f"{MODULE}.weight": torch.randn(8, 8), "model.embed_tokens.weight": torch.randn(11, 8)}
    tensors["lm_head.weight"] = torch.randn(11, 8)
    names = sorted(tensors)
    base = make_checkpoint(tmp_path / "base", tensors, shards=[names[:1], names[1:]])
    (base / "tokenizer.json").write_text("{}")
    (base / "odd [name] *.json").write_text("{}")
    pairs = {MODULE: (torch.randn(2, 8), torch.randn(8, 2))}
    patch = make_patch(tmp_path / "patch", pairs, target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    return {"patch": patch, "onto": base, "out": tmp_path / "out"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: Any, repo: str = "me/x", branch: str = "main") -> dict[str, bytes]:
    files = hub.files(repo, branch)
    del files[".gitattributes"]
    return files


@pytest.mark.parametrize("as_", ["merged", "adapter"])
def test_push_uploads_every_file(hub: Any, inputs: dict[str, Any], as_: Any) -> None:
    record = portllm.port(**inputs, as_=as_, push_to_hub="me/x")
    assert pushed(hub) == contents(inputs["out"])
    assert set(pushed(hub)) == {*record.files, "port.json"}
    assert pushed(hub)["README.md"].startswith(b"---\n")
    assert hub.tokens == {f"Bearer {os.environ['HF_TOKEN']}"}
    assert not hub.repos["me/x"]["private"]


def test_push_without_an_owner_to_a_private_branch(hub: Any, inputs: dict[str, Any]) -> None:
    portllm.port(**inputs, push_to_hub="x", private=True, revision="v2")
    assert hub.repos["me/x"]["private"]
    assert pushed(hub, branch="v2") == contents(inputs["out"])
    assert pushed(hub) == {}


def test_the_token_is_in_the_requests_only(hub: Any, inputs: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    token = os.environ["HF_TOKEN"]
    words = ["port", str(inputs["patch"]), "--onto", str(inputs["onto"]), "--out", str(inputs["out"])]
    with caplog.at_level(logging.DEBUG):
        done = CliRunner().invoke(main, ["--no-track", *words, "--push-to-hub", "me/x", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["pushed"] == {"repo": "me/x", "revision": "main", "commit": "1" * 40, "url": f"{hub.url}/me/x"}
    again = CliRunner().invoke(main, ["--no-track", *words, "--push-to-hub", "me/x"])
    assert "is the result of this very port" in again.stdout
    hub.failures["/commit/"] = (500, f"we saw {token}")
    failed = CliRunner().invoke(main, ["--no-track", *words, "--force", "--push-to-hub", "me/y"])
    assert failed.exit_code == 1
    assert "we saw <token>" in failed.stderr
    assert token not in done.output + failed.output + caplog.text
    for name, content in contents(inputs["out"].parent).items():
        assert token.encode() not in content, name


@pytest.mark.parametrize(
    ("part", "status", "says"),
    [
        ("whoami", 401, "log in again"),
        ("repos/create", 403, "may not write there"),
        ("preupload", 403, "may not write there"),
        ("lfs/objects", 404, "no such repository or branch"),
        ("/store/", 403, "may not write there"),
        ("validate-yaml", 400, "the upload failed"),
        ("/commit/", 413, r"refused \(HTTP 413: too much\)"),
        ("/commit/", 500, "try again later"),
        ("/tree/", 500, "try again later"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(
    hub: Any, inputs: dict[str, Any], part: str, status: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's library waits between its attempts
    hub.failures[part] = (status, "too much")
    with pytest.raises(HubError, match=says) as caught:
        portllm.port(**inputs, push_to_hub="me/x")
    assert "\n" not in str(caught.value)
    early = part == "whoami"
    assert inputs["out"].exists() != early
    assert ("nothing was ported" in str(caught.value)) == early
    if not early:
        assert "hf upload me/x" in str(caught.value)
        portllm.verify(inputs["out"], onto=inputs["onto"], patch=inputs["patch"])


def test_a_failed_push_is_repeated_without_porting_again(
    hub: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failures["/commit/"] = (500, "down")
    with pytest.raises(HubError):
        portllm.port(**inputs, push_to_hub="me/x")
    hub.failures.clear()
    monkeypatch.setattr(port_verb, "run", lambda **_: pytest.fail("ported again"))
    portllm.port(**inputs, push_to_hub="me/x")
    assert pushed(hub) == contents(inputs["out"])
    portllm.port(**inputs, push_to_hub="me/x")  # and once more changes nothing
    assert pushed(hub) == contents(inputs["out"])


def test_only_the_very_same_port_is_pushed_without_porting(hub: Any, inputs: dict[str, Any]) -> None:
    record = portllm.port(**inputs)
    for other in ({"scale": 0.5}, {"as_": "adapter"}, {"patch": inputs["onto"].parent / "other"}):
        if "patch" in other:
            tensors = inputs["patch"] / "adapter_model.safetensors"
            other["patch"].mkdir()
            content = bytearray(tensors.read_bytes())
            content[-1] ^= 1
            (other["patch"] / tensors.name).write_bytes(content)
            config = (inputs["patch"] / "adapter_config.json").read_bytes()
            (other["patch"] / "adapter_config.json").write_bytes(config)
        with pytest.raises(OutputError, match="--force"):
            portllm.port(**{**inputs, **other}, push_to_hub="me/x")
    for file, more in (
        (inputs["patch"] / "adapter_config.json", {"lora_alpha": 9}),
        (inputs["onto"] / "config.json", {"x": 1}),
    ):
        before = file.read_text()  # what no fingerprint covers
        file.write_text(json.dumps({**json.loads(before), **more}))
        with pytest.raises(OutputError, match="--force"):
            portllm.port(**inputs, push_to_hub="me/x")
        file.write_text(before)
    (inputs["onto"] / "tokenizer.json").write_text("[1]")
    with pytest.raises(OutputError, match="--force"):
        portllm.port(**inputs, push_to_hub="me/x")
    (inputs["onto"] / "tokenizer.json").write_text("{}")
    (inputs["out"] / "tokenizer.json").write_text("[]")
    with pytest.raises(VerificationError, match=r"tokenizer\.json"):
        portllm.port(**inputs, push_to_hub="me/x")
    assert hub.repos == {}
    assert portllm.port(**inputs, force=True, push_to_hub="me/x") == record


def test_a_push_that_cannot_succeed_is_refused_before_porting(
    hub: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo in ("", "a/b/c", "me/", "/x", "../x", "./out", "me/x y", "me/x--y", "me/x..y", "me/x.git", "-me/x", "é/x",
                 "me/" + "x" * 99, "https://hf.co/me/x"):  # fmt: skip
        with pytest.raises(ParamsError, match="expected OWNER/NAME"):
            portllm.port(**inputs, push_to_hub=repo)
    for branch in ("", "a b", "../b", "-f"):
        with pytest.raises(ParamsError, match="--revision"):
            portllm.port(**inputs, push_to_hub="me/x", revision=branch)
    assert hub.asked == []
    hub.role = "read"
    with pytest.raises(HubError, match="can only read"):
        portllm.port(**inputs, push_to_hub="me/x")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        portllm.port(**inputs, push_to_hub="me/x")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        portllm.port(**inputs, push_to_hub="me/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        portllm.port(**inputs, push_to_hub="me/x")
    assert not inputs["out"].exists()
    assert {path for _, path in hub.asked} == {"/api/whoami-v2"}


def test_a_repository_with_other_weights_or_public_is_refused(hub: Any, inputs: dict[str, Any]) -> None:
    portllm.port(**inputs, push_to_hub="me/x")
    hub.repos["me/x"]["branches"]["main"]["model.safetensors"] = b"other weights"
    with pytest.raises(HubError, match=r"has model\.safetensors already"):
        portllm.port(**inputs, push_to_hub="me/x")
    del hub.repos["me/x"]["branches"]["main"]["model.safetensors"]
    with pytest.raises(HubError, match="exists and is public"):
        portllm.port(**inputs, push_to_hub="me/x", private=True)
    assert hub.asked_for("/commit/") == 1


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "port.json"])
def test_a_file_missing_on_the_hub_is_an_error(hub: Any, inputs: dict[str, Any], name: str) -> None:
    hub.loses = name
    with pytest.raises(HubError, match=f"{name} did not arrive as it is here, the hub has none"):
        portllm.port(**inputs, push_to_hub="me/x")


def test_a_dry_run_pushes_nothing_and_flags_go_together(hub: Any, inputs: dict[str, Any]) -> None:
    portllm.port(**inputs, dry_run=True, push_to_hub="me/x")
    assert hub.repos == {}
    words = ["port", str(inputs["patch"]), "--onto", str(inputs["onto"]), "--out", str(inputs["out"])]
    assert CliRunner().invoke(main, [*words, "--private"]).exit_code == 2
    assert CliRunner().invoke(main, [*words, "--revision", "b"]).exit_code == 2
    assert api.Destination("me/x").revision is None
    assert not inputs["out"].exists()
    assert PortRecord.FILE == "port.json"
