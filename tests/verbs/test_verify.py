"""A ported directory is proven, or the first file or tensor that differs is named; nothing is believed unchecked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import portllm
from portllm.checkpoint.files import hashing as fingerprint
from portllm.checkpoint.record.records import PortRecord
from portllm.checkpoint.verification.proof import TensorSample
from portllm.cli import main
from portllm.errors import CheckpointError, ParamsError, PortllmError, UnsafeFileError, VerificationError
from portllm.params import PortParams
from portllm.verbs import port, verify

MODULES = [f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj")]
WIDE = "model.layers.1.mlp.up_proj"


@dataclasses.dataclass(frozen=True)
class World:
    """A base, a patch and what was ported from them, each in its directory."""

    base: Path
    patch: Path
    merged: Path
    adapter: Path

    def proven(self, folder: Path, **more: Any) -> verify.VerifyRecord:
        return verify.run(folder=folder, onto=self.base, patch=self.patch, **more)


@pytest.fixture
def world(tmp_path: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]) -> World:
    torch.manual_seed(3)
    tensors = {f"{module}.weight": torch.randn(8, 8).bfloat16() for module in MODULES}
    tensors |= {f"{WIDE}.weight": torch.randn(24, 8), "model.embed_tokens.weight": torch.randn(11, 8)}
    tensors |= {"lm_head.weight": torch.randn(11, 8), "model.norm.weight": torch.randn(8)}
    names = sorted(tensors)
    base = make_checkpoint(tmp_path / "base", tensors, shards=[names[:4], names[4:]])
    (base / "tokenizer.json").write_text("{}")
    pairs = {module: (torch.randn(2, 8), torch.randn(8, 2)) for module in MODULES}
    pairs[WIDE] = (torch.randn(2, 8), torch.randn(24, 2))
    patch = make_patch(tmp_path / "patch", pairs, target_modules=["q_proj", "v_proj", "up_proj"])
    made = World(base, patch, tmp_path / "merged", tmp_path / "adapter")
    for as_, out in (("merged", made.merged), ("adapter", made.adapter)):
        port.run(patch=patch, onto=base, out=out, params=PortParams(as_=as_, scale=0.5))
    return made


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def forge(folder: Path, **changes: Any) -> None:
    """Make port.json agree with the directory as it is now, as a careful forger would."""
    tree = json.loads((folder / "port.json").read_text())
    tree["files"] = {name: fingerprint.file_digest(folder / name, "blake3") for name in tree["files"]}
    tree["fingerprint"] = fingerprint.fingerprint(folder)
    (folder / "port.json").write_text(json.dumps({**tree, **changes}))


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_verify_reads_port_json_with_sha256_digests(world: World, kind: str) -> None:
    """A port.json of schema version 1 holds SHA-256 digests, one of version 2 BLAKE3 (issue 8, item 21)."""
    folder = getattr(world, kind)
    tree = json.loads((folder / "port.json").read_text())
    assert tree["schema_version"] == 2
    assert tree["files"] == {name: blake3((folder / name).read_bytes()).hexdigest() for name in tree["files"]}
    old = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in tree["files"]}
    configs = (world.base / "config.json", world.patch / "adapter_config.json")
    old_configs = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in configs}
    older = {**tree, "schema_version": 1, "files": old, "configs": old_configs}
    (folder / "port.json").write_text(json.dumps(older))
    assert world.proven(folder).lines()[0].endswith("and no other weights are there")
    assert "SHA-256 of each" in world.proven(folder).lines()[0]
    flip(folder / "tokenizer.json" if kind == "merged" else folder / "README.md", 0)
    with pytest.raises(VerificationError, match="has SHA-256"):
        verify.run(folder=folder)


@pytest.mark.parametrize("version", [1, 3, "2"])
def test_verify_refuses_digests_of_another_kind(world: World, version: object) -> None:
    """Version 1 with BLAKE3 digests is a changed directory, an unknown version an error (issue 8, item 21)."""
    tree = json.loads((world.merged / "port.json").read_text())
    (world.merged / "port.json").write_text(json.dumps({**tree, "schema_version": version}))
    with pytest.raises(PortllmError, match="has SHA-256" if version == 1 else "expected schema version 2"):
        verify.run(folder=world.merged)


def file_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def edit(file: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    save_file({**tensors, tensor: change(tensors[tensor])}, file, metadata={"format": "pt"})


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        yield path.as_posix(), path.read_bytes() if path.is_file() else b""


def test_an_untouched_port_is_proven_and_left_as_it_is(world: World) -> None:
    before = list(contents(world.base.parent))
    assert verify.run(folder=world.merged).proof is None
    merged = world.proven(world.merged, sample=TensorSample(everything=True)).proof
    assert merged is not None
    assert set(merged.recomputed) == {f"{module}.weight" for module in (*MODULES, WIDE)}
    assert (merged.identical, merged.changed, merged.too_large) == (3, 5, ())
    adapter = world.proven(world.adapter).proof
    assert adapter is not None
    assert (adapter.identical, adapter.changed) == (10, 0)
    assert list(contents(world.base.parent)) == before


def test_the_sample_has_the_largest_and_follows_the_seed(world: World) -> None:
    proofs = [world.proven(world.merged, sample=TensorSample(2, seed=seed)).proof for seed in range(8)]
    samples = {proof.recomputed for proof in proofs if proof is not None}
    assert all(f"{WIDE}.weight" in sample and len(sample) == 2 for sample in samples)
    assert len(samples) > 1
    again = world.proven(world.merged, sample=TensorSample(2, seed=0)).proof
    assert again == proofs[0]


@pytest.mark.parametrize("output", ["merged", "adapter"])
def test_any_flipped_bit_of_any_file_is_found(world: World, output: str) -> None:
    folder = getattr(world, output)
    names = sorted(PortRecord.read(folder).files)
    assert len(names) == len(list(folder.iterdir())) - 1
    for name in names:
        size = (folder / name).stat().st_size
        for at in (0, size // 2, size - 1):
            flip(folder / name, at)
            with pytest.raises(PortllmError, match=name) as caught:
                verify.run(folder=folder)
            assert "\n" not in str(caught.value)
            flip(folder / name, at)
    verify.run(folder=folder)


def test_cached_digests_are_not_believed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "cached", lambda shard: dict.fromkeys(shard.tensors, "0" * 64))
    verify.run(folder=world.merged)


@pytest.mark.parametrize("step", [2.0**-7, 1e30])
def test_a_forged_changed_tensor_is_named(world: World, step: float) -> None:
    """One element moved by one unit in its last place, and port.json made to agree."""
    tensor = f"{MODULES[2]}.weight"

    def move(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] *= 1 + step
        return weight

    edit(file_of(world.merged, tensor), tensor, move)
    forge(world.merged)
    verify.run(folder=world.merged)  # port.json alone cannot know
    with pytest.raises(VerificationError, match=rf"{tensor}: element \[3, 5\]"):
        world.proven(world.merged, sample=TensorSample(everything=True))


def test_a_forged_untouched_tensor_is_named(world: World) -> None:
    edit(file_of(world.merged, "model.norm.weight"), "model.norm.weight", lambda weight: weight + 1)
    forge(world.merged)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight: expected the base's own bytes"):
        world.proven(world.merged)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {**t, "more.weight": torch.ones(2)}, "more.weight: expected none, found F32 2"),
        (lambda t: {**t, "model.norm.weight": t["model.norm.weight"].half()}, "expected F32 8 in .*, found F16 8"),
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, "model.norm.weight: .* found none"),
    ],
)
def test_other_tensors_than_planned_are_named(world: World, change: Callable[..., Any], says: str) -> None:
    file = file_of(world.merged, "model.norm.weight")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    index = world.merged / "model.safetensors.index.json"
    shards = {path.name: load_file(path) for path in world.merged.glob("*.safetensors")}
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    forge(world.merged)
    with pytest.raises(VerificationError, match=says):
        world.proven(world.merged)


def test_forged_companions_and_configs_are_named(world: World) -> None:
    (world.merged / "tokenizer.json").write_text('{"other": 1}')
    forge(world.merged)
    with pytest.raises(VerificationError, match="tokenizer.json: expected a copy of"):
        world.proven(world.merged)
    tree = json.loads((world.adapter / "adapter_config.json").read_text())
    for key, value in (("lora_alpha", 2 * tree["lora_alpha"]), ("target_modules", ["up_proj"]), ("use_rslora", True)):
        (world.adapter / "adapter_config.json").write_text(json.dumps({**tree, key: value}))
        forge(world.adapter)
        with pytest.raises(PortllmError, match=r"adapter_config\.json|target_modules"):
            world.proven(world.adapter)


def test_a_forged_factor_is_named(world: World) -> None:
    name = f"base_model.model.{MODULES[0]}.lora_B.weight"
    edit(world.adapter / "adapter_model.safetensors", name, lambda weight: -weight)
    forge(world.adapter)
    with pytest.raises(VerificationError, match="expected the patch's own bytes"):
        world.proven(world.adapter)


def test_other_inputs_are_told_from_the_right_ones(world: World, tmp_path: Path) -> None:
    for kind, flag in (("base", "--onto"), ("patch", "--patch")):
        other = tmp_path / f"other-{kind}"
        shutil.copytree(getattr(world, kind), other)
        file = next(other.glob("*.safetensors"))
        flip(file, file.stat().st_size - 2)
        with pytest.raises(VerificationError, match=rf"has fingerprint .*{flag}"):
            dataclasses.replace(world, **{kind: other}).proven(world.merged)


def test_other_configs_are_told_from_the_right_ones(world: World) -> None:
    for folder, name, key in ((world.patch, "adapter_config.json", "lora_alpha"), (world.base, "config.json", "x")):
        before = (folder / name).read_text()
        (folder / name).write_text(json.dumps({**json.loads(before), key: 7}))
        with pytest.raises(VerificationError, match=f"{folder.name}/{name}: has BLAKE3"):
            world.proven(world.merged)
        (folder / name).write_text(before)
    world.proven(world.merged)


def test_missing_and_strange_files_are_named(world: World) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "old/model.safetensors", "adapter_config.json", "run.py"):
        stranger = world.merged / name
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_bytes(b"x")
        with pytest.raises(PortllmError, match=name):
            verify.run(folder=world.merged)
        stranger.unlink()
    (world.merged / "notes.md").write_text("harmless")
    verify.run(folder=world.merged)
    (world.merged / "tokenizer.json").unlink()
    with pytest.raises(VerificationError, match=r"tokenizer\.json: is in port\.json and not in the directory"):
        verify.run(folder=world.merged)


@pytest.mark.parametrize(
    "name", ["../base/config.json", "/etc/passwd", "a/../config.json", "./config.json", "a\\b", "", "\0", "port.json"]
)
def test_a_name_in_port_json_never_leads_out(world: World, name: str) -> None:
    tree = json.loads((world.merged / "port.json").read_text())
    tree["files"][name] = fingerprint.file_digest(world.base / "config.json")
    (world.merged / "port.json").write_text(json.dumps(tree))
    with pytest.raises(UnsafeFileError, match="expected a plain name in the directory"):
        verify.run(folder=world.merged)


def test_links_may_stay_inside_or_lead_to_a_hub_caches_blobs(world: World, tmp_path: Path) -> None:
    shutil.copy(world.merged / "tokenizer.json", tmp_path / "elsewhere")
    (world.merged / "tokenizer.json").unlink()
    (world.merged / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="leads out of the directory"):
        verify.run(folder=world.merged)
    repo = tmp_path / "models--me--ported"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in world.merged.iterdir():
        shutil.copy(path, repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", path.name))
    verify.run(folder=snapshot)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 9}, {"output": "both"}, {"scale": "1"}, {"scale": True}, {"files": {}}, {"files": ["a"]},
        {"files": {"config.json": "abc"}}, {"fingerprint": None}, {"fingerprint": 3}, {"base": None}, {"base": {}},
        {"base": {"name": 1, "fingerprint": None}}, {"patch": "p"}, {"trained_on": [1]}, {"tensors": {"a": "b"}},
        {"modules": 4}, {"configs": {"config.json": "x"}}, {"task": 1}, {"method": None}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_record_is_refused(world: World, change: dict[str, Any]) -> None:
    tree = json.loads((world.merged / "port.json").read_text())
    (world.merged / "port.json").write_text(json.dumps({**tree, **change}))
    with pytest.raises(CheckpointError, match=r"port\.json"):
        verify.run(folder=world.merged)


def test_no_port_json_and_no_directory(world: World, tmp_path: Path) -> None:
    (world.merged / "port.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        verify.run(folder=world.merged)
    with pytest.raises(CheckpointError, match=r"has no port\.json"):
        verify.run(folder=world.base)
    with pytest.raises(CheckpointError, match="found nothing"):
        verify.run(folder=tmp_path / "none")


def test_progress_counts_every_byte_once(world: World) -> None:
    seen: list[tuple[int, int]] = []
    world.proven(world.merged, on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_base_and_patch_go_together(world: World) -> None:
    with pytest.raises(ParamsError, match="--onto BASE --patch PATCH"):
        verify.run(folder=world.merged, onto=world.base)
    with pytest.raises(ParamsError, match="at least 1"):
        world.proven(world.merged, sample=TensorSample(0))


def test_on_the_command_line_and_in_python(world: World) -> None:
    words = ["verify", str(world.merged), "--onto", str(world.base), "--patch", str(world.patch)]
    done = CliRunner().invoke(main, ["--no-track", *words, "--sample", "2", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["proof"]["tensors"] == {"identical": 3, "changed": 5, "recomputed": 2}
    assert told["fingerprint"] == PortRecord.read(world.merged).fingerprint
    plain = CliRunner().invoke(main, ["--no-track", *words])
    assert "5 of 5 changed tensors" in plain.stdout
    for wrong in (["--patch", "p"], ["--all"], ["--onto", "b", "--patch", "p", "--all", "--sample", "3"]):
        assert CliRunner().invoke(main, ["verify", str(world.merged), *wrong]).exit_code == 2
    assert portllm.verify(world.merged, onto=world.base, patch=world.patch, all=True).proof is not None
    flip(world.merged / "config.json", 3)
    broken = CliRunner().invoke(main, ["--no-track", *words])
    assert (broken.exit_code, broken.stdout) == (1, "")
    assert broken.stderr.startswith("Error: ")
    assert "config.json" in broken.stderr
    assert len(broken.stderr.splitlines()) == 1


def test_names_that_are_no_utf8(world: World) -> None:
    """A directory's is shown with a mark in the record; a file's, which the record has to name, is refused."""
    base = world.base.rename(world.base.parent / os.fsdecode(b"caf\xe9"))
    out = world.base.parent / "out"
    port.run(patch=world.patch, onto=base, out=out, params=PortParams())
    assert PortRecord.read(out).base.name == "caf\ufffd"
    dataclasses.replace(world, base=base).proven(out)
    (base / os.fsdecode(b"\xff.json")).write_text("{}")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        port.run(patch=world.patch, onto=base, out=out, params=PortParams(), force=True)


STRANGE = (
    None, 0, -1, 1e308, "", "\ud800", "../x", "x" * 70, [], {}, True, {"a": {}}, "0" * 64, "\n", ["config.json"],
)  # fmt: skip


def mutate(tree: dict[str, Any], dice: random.Random) -> None:
    """Take something out of a record, put something in, or put something strange in its place."""
    node = tree
    key = dice.choice(sorted(node))
    while isinstance(node[key], dict) and node[key] and dice.random() < 0.7:
        node = node[key]
        key = dice.choice(sorted(node))
    kind = dice.randrange(3)
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[dice.choice(["more", "..", "/", "model.safetensors", "\0", "a/b"])] = dice.choice(STRANGE)
    else:
        node[key] = dice.choice(STRANGE)


def test_a_mutated_record_never_ends_in_anything_but_one_line(world: World) -> None:
    """A few hundred seeded mutations of port.json: each is refused in one line, or changes nothing that is checked."""
    dice, refusals = random.Random(5), []
    original = (world.merged / "port.json").read_text()
    for _ in range(300):
        tree = json.loads(original)
        mutate(tree, dice)
        (world.merged / "port.json").write_text(json.dumps(tree))
        try:
            verify.run(folder=world.merged)
        except PortllmError as error:
            refusals.append(str(error))
    assert len(refusals) > 150
    assert not any("\n" in text for text in refusals)
