"""What every test may use: folders of its own, and tiny checkpoints and patches made of given tensors."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import surroundings

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "tie_word_embeddings": False}
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}
# fixtures that take more than a few seconds to make, by module: the tests that need one are slow
SLOW_FIXTURES = {"tests/test_tracking.py": "project"}
WORKER_BYTES, MOST_WORKERS = 2 << 30, 8  # a worker with every library loaded; more of them gain little


def pytest_configure(config: pytest.Config) -> None:
    """Give the run an environment of its own before any library is imported."""
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is None:
        config.pluginmanager.register(surroundings.UnchangedProject(config.rootpath))
    config.pluginmanager.register(surroundings.Surroundings(worker=worker), "surroundings")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Return the processes of `-n auto`: one for each core this process may use, while memory lasts."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    fitting = psutil.virtual_memory().available // WORKER_BYTES
    return max(1, min(len(os.sched_getaffinity(0)), fitting, MOST_WORKERS))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of one module in one process, so that its fixtures are made once; slow modules go first.

    A module or a folder's conftest may choose another group. Those with limits in seconds are all in the group `timed`,
    one after another.
    """
    for item in items:
        module = item.nodeid.partition("::")[0]
        if SLOW_FIXTURES.get(module) in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(module))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def default_signals() -> Iterator[None]:
    """Let signals reach this process and what it starts, also where the shell ignores them (`nohup make test &`)."""
    before = surroundings.restore_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Work outside the project, so that nothing lands there by default: an mlflow.db, a models/ of `--out models/…`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Kill what a test leaves running, so that no other test fails by it; the test that left it fails."""
    before = surroundings.children()
    yield
    if left := surroundings.end(surroundings.children() - before):
        pytest.fail(f"the test left processes running: {left}")


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
