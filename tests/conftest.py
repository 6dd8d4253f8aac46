"""What every test may use: a private cache, and tiny checkpoints and patches made of given tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "tie_word_embeddings": False}
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep portllm's caches of this test to itself."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def make_checkpoint() -> Callable[..., Path]:
    """make_checkpoint(folder, tensors, config=…, shards=[[names], …]): a directory as transformers saves it."""

    def make(
        folder: Path,
        tensors: Mapping[str, Any],
        config: Mapping[str, Any] = LLAMA,
        shards: Sequence[Sequence[str]] = (),
    ) -> Path:
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(dict(config)))
        if not shards:
            save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for file, names in zip(files, shards, strict=True):
            save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return make


@pytest.fixture
def make_patch() -> Callable[..., Path]:
    """make_patch(folder, {module: (a, b)}, r=…, extra={key: tensor}): a PEFT directory as peft saves it."""

    def make(
        folder: Path, pairs: Mapping[str, tuple[Any, Any]], extra: Mapping[str, Any] | None = None, **config: Any
    ) -> Path:
        from safetensors.torch import save_file

        tensors = dict(extra or {})
        for module, (a, b) in pairs.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({**LORA, **config}))
        return folder

    return make


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The hub's stand-in (tests.hub.Hub), running, with huggingface_hub turned to it, an empty cache and a token."""
    from huggingface_hub import constants

    from tests.hub import TOKEN, running

    with running() as server:
        home = tmp_path_factory.mktemp("home")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol, to its own servers
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
