"""A checkpoint is read one tensor at a time, and only from files of its own directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.files.names import INDEX
from portllm.errors import CheckpointError, UnsafeFileError

TENSORS = {
    "model.x.weight": torch.arange(12.0).view(3, 4).bfloat16(),
    "model.y.weight": torch.arange(5.0),
    "empty": torch.ones(0, 3),
}
SHARDS = [["model.y.weight"], ["model.x.weight", "empty"]]
Make = Callable[..., Path]


@pytest.mark.parametrize("shards", [(), SHARDS])
def test_reads_what_was_saved(shards: list[list[str]], tmp_path: Path, make_checkpoint: Make) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "c", TENSORS, shards=shards))
    assert checkpoint.names == tuple(sorted(TENSORS))
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.entry("model.x.weight").shape == (3, 4)
    assert checkpoint.entry("model.x.weight").dtype == "BF16"
    for name, tensor in TENSORS.items():
        assert checkpoint.entry(name).read().dtype == tensor.dtype
        assert torch.equal(checkpoint.entry(name).read(), tensor)


def test_follows_links_as_the_hub_cache_has_them(tmp_path: Path, make_checkpoint: Make) -> None:
    blobs = make_checkpoint(tmp_path / "blobs", TENSORS)
    (tmp_path / "snapshot").mkdir()
    for path in blobs.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert torch.equal(Checkpoint.open(tmp_path / "snapshot").entry("model.y.weight").read(), TENSORS["model.y.weight"])


def test_unknown_tensor_is_named(tmp_path: Path, make_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError, match="has no tensor nope"):
        Checkpoint.open(make_checkpoint(tmp_path / "c", TENSORS)).entry("nope").read()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "x.bin", ""])
def test_index_may_not_lead_elsewhere(name: str, tmp_path: Path, make_checkpoint: Make) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS, shards=SHARDS)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.y.weight": name}}))
    with pytest.raises(UnsafeFileError, match="expected a safetensors file next to it"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "is empty"),
        ([], "must map"),
        ({"model.y.weight": 3}, "must map"),
        ({"model.y.weight": "model-00002-of-00002.safetensors"}, "is not in"),
        ({"model.y.weight": "model-00001-of-00002.safetensors"}, "is not in|cannot be read|does not name"),
        ({"model.y.weight": "gone.safetensors"}, "cannot be read"),
    ],
)
def test_index_must_agree_with_its_shards(
    weight_map: object, message: str, tmp_path: Path, make_checkpoint: Make
) -> None:
    shards = [["model.y.weight", "empty"], ["model.x.weight"]]
    folder = make_checkpoint(tmp_path / "c", TENSORS, shards=shards)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path, make_checkpoint: Make) -> None:
    folder = make_checkpoint(
        tmp_path / "c", TENSORS, shards=[["model.y.weight"], ["model.y.weight"], ["model.x.weight"]]
    )
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["other"] = "model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is in two shards"):
        Checkpoint.open(folder)


def test_single_file_and_index_together_are_ambiguous(tmp_path: Path, make_checkpoint: Make) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model-00001-of-00002.safetensors")}))
    with pytest.raises(CheckpointError, match="remove the stale one"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}))
    assert Checkpoint.open(folder).names == tuple(sorted(TENSORS))


def test_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnsafeFileError, match=r"pickle.*python -c .*save_pretrained.*my model' NEW_DIR"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("config", "message"), [(None, "has no config.json"), ("{", "not readable JSON"), ("[1]", "expected a JSON object")]
)
def test_config_must_be_an_object(config: str | None, message: str, tmp_path: Path, make_checkpoint: Make) -> None:
    folder = make_checkpoint(tmp_path / "c", TENSORS)
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_a_directory_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model directory, found nothing"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        Checkpoint.open(tmp_path / "file")
    (tmp_path / "file").unlink()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is this a model directory"):
        Checkpoint.open(tmp_path / "c")


def test_equal_values_looks_at_numbers_not_bytes(tmp_path: Path, make_checkpoint: Make) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.arange(6.0).view(2, 3).half(),
        "c": torch.arange(6.0).view(3, 2),
    }
    tensors["d"] = tensors["a"].clone()
    tensors["d"][1, 2] += 1
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "c", tensors))
    a, b, c, d = (checkpoint.entry(name) for name in "abcd")
    assert a.equals(b)
    assert not a.equals(c)
    assert not a.equals(d)
