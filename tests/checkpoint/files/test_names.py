"""What a ported checkpoint takes along beside its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from portllm.checkpoint.files.names import companions, tokenizer_files

BASE = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE", "modeling_own.py", "subfolder/notes.txt",
]  # fmt: skip
NEVER = [
    "model.safetensors", "model.safetensors.index.json", "consolidated.safetensors", "pytorch_model.bin", "model.gguf",
    "subfolder/model.onnx", "README.md", "port.json", "release.json", ".gitattributes", ".cache/huggingface/x.json",
]  # fmt: skip


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return fill(tmp_path / "base", BASE + NEVER)


def names_from(files: dict[str, Path], folder: Path) -> set[str]:
    return {name for name, path in files.items() if folder in path.parents}


def test_everything_but_weights_and_records(base: Path, tmp_path: Path) -> None:
    files = companions(base, fill(tmp_path / "patch", ["adapter_config.json", "adapter_model.safetensors"]))
    assert set(files) == set(BASE)
    assert names_from(files, base) == set(BASE)


def test_a_patch_with_a_tokenizer_brings_all_of_it(base: Path, tmp_path: Path) -> None:
    own = ["tokenizer.json", "tokenizer_config.json"]
    patch = fill(tmp_path / "patch", [*own, "training_args.bin", "README.md", "history.csv"])
    files = companions(base, patch)
    assert names_from(files, patch) == set(own)
    gone = {"tokenizer.model", "chat_template.jinja", "additional_chat_templates/tool.jinja"}
    assert set(files) == set(BASE) - gone


def test_a_patch_with_a_chat_template_brings_just_that(base: Path, tmp_path: Path) -> None:
    patch = fill(tmp_path / "patch", ["chat_template.jinja"])
    files = companions(base, patch)
    assert names_from(files, patch) == {"chat_template.jinja"}
    assert set(files) == set(BASE) - {"additional_chat_templates/tool.jinja"}


def test_tokenizer_files(base: Path) -> None:
    assert set(tokenizer_files(base)) == {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    }  # fmt: skip


def test_links_to_files_are_followed_links_to_folders_are_not(tmp_path: Path) -> None:
    outside = fill(tmp_path / "blobs", ["x"])
    folder = fill(tmp_path / "base", ["config.json"])
    (folder / "tokenizer.json").symlink_to(outside / "x")
    (folder / "loop").symlink_to(folder)
    assert set(companions(folder, outside)) == {"config.json", "tokenizer.json"}
