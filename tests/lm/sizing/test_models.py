"""A model is described without being fetched: from params, a directory, the hub's stand-in, or what was published."""

from __future__ import annotations

import json
from typing import Any

import pytest

from portllm.errors import CheckpointError
from portllm.lm.remote.hub import resolve
from portllm.lm.sizing import models
from portllm.params import ArchitectureParams, FetchParams

pytestmark = pytest.mark.filterwarnings("ignore")  # the hub's library warns of its own affairs

CONFIG = {
    "model_type": "mistral", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
REPO = "mistralai/Mistral-7B-v0.1"
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": bytes(5000), "pytorch_model.bin": bytes(9000)}


def test_the_hub_is_asked_for_sizes_and_config_alone(hub: Any) -> None:
    commit = hub.add(REPO, FILES)
    found = models.describe(REPO, FetchParams())
    assert found.origin == f"the hub at {commit[:12]}"
    assert found.shape is not None
    assert (found.shape.layers, found.shape.dtype_bytes) == (1, 2)
    assert 5000 <= found.network_bytes < 9000, "pickled weights are not downloaded"
    assert hub.ranges == [], "no weights were asked for"
    resolve(REPO)
    assert models.describe(REPO, FetchParams()).network_bytes == 0


def test_a_gated_model_says_what_to_do(hub: Any) -> None:
    hub.add(REPO, FILES, gated=True)
    with pytest.raises(CheckpointError, match="gated"):
        models.describe(REPO, FetchParams())


def test_out_of_reach_the_published_shape_is_known_and_no_other() -> None:
    known, unknown = models.published(REPO + "@main"), models.published("owner/name")
    assert known.parameters == 7_241_732_096
    assert known.network_bytes == known.stored_bytes == 2 * 7_241_732_096
    assert (unknown.shape, unknown.parameters) == (None, None)


def test_a_model_of_ones_own_has_the_shape_of_its_params() -> None:
    fetch = FetchParams(vocab_size=512, architecture=ArchitectureParams(hidden_size=16, layers=3))
    shape = models.describe("scratch", fetch).shape
    assert shape is not None
    assert (shape.vocabulary, shape.layers, shape.hidden) == (512, 3, 16)
    with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
        models.describe("a/b/c", fetch)
