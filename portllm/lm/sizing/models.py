"""The model an experiment starts from, described without fetching it: its shape, its bytes, what must be downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.errors import CheckpointError
from portllm.lm.sizing.shapes import PUBLISHED, Shape, from_config
from portllm.params import FetchParams

WORLD, SCRATCH = "world", "scratch"
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Model:
    """`origin` says where the shape was read; `network_bytes` is what is not on this machine yet."""

    name: str
    origin: str
    shape: Shape | None
    parameters: int | None
    stored_bytes: int | None
    network_bytes: int


def describe(source: str, fetch: FetchParams) -> Model:
    """The model `source` names, as `fetch.source` does. Raises CheckpointError where it cannot be had."""
    if source in (WORLD, SCRATCH):
        return _model(_made(source, fetch), source, "params.yaml")
    folder = Path(source)
    if folder.is_dir():
        return _on_disk(folder)
    return _on_hub(source)


def published(source: str) -> Model:
    """What is known of `source` without any file of it."""
    name = source.partition("@")[0]
    shape = PUBLISHED.get(name)
    return _model(shape, name, "the published shape", network_bytes=shape.stored_bytes if shape else 0)


def _model(shape: Shape | None, name: str, origin: str, *, stored: int | None = None, network_bytes: int = 0) -> Model:
    return Model(
        name=name,
        origin=origin,
        shape=shape,
        parameters=shape.parameters if shape else None,
        stored_bytes=stored if stored is not None else shape.stored_bytes if shape else None,
        network_bytes=network_bytes,
    )


def _made(source: str, fetch: FetchParams) -> Shape:
    from portllm.world import phrases

    made = fetch.architecture
    special = 3  # padding, end, unknown: see world/tokenizer.py
    vocabulary = fetch.vocab_size if source == SCRATCH else special + len(phrases.vocabulary())
    return Shape(
        name=source, kind="llama", hidden=made.hidden_size, intermediate=made.intermediate_size, layers=made.layers,
        heads=made.heads, kv_heads=made.kv_heads or made.heads, head_dim=made.hidden_size // made.heads,
        vocabulary=vocabulary, tied=made.tie_word_embeddings, dtype_bytes=4,
    )  # fmt: skip


def _on_disk(folder: Path) -> Model:
    config = _config(folder / CONFIG)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return _model(from_config(config, folder.name), folder.name, CONFIG, stored=stored)


def _on_hub(source: str) -> Model:
    from huggingface_hub import hf_hub_download

    from portllm.lm.remote.hub import HUB_ID, Asked

    match = HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source!r}: neither a directory nor a hub id; correct fetch.source")
    asked = Asked(source, match["repo"], match["revision"], False)
    with asked.reasons():
        plan = asked.plan()
        if plan is None:
            folder = asked.cached()
            return _model(from_config(_config(folder / CONFIG), match["repo"]), match["repo"], "the hub's cache")
        config = _config(Path(hf_hub_download(match["repo"], CONFIG, revision=plan.commit)))
    origin = f"the hub at {plan.commit[:12]}"
    shape = from_config(config, match["repo"])
    return _model(shape, match["repo"], origin, network_bytes=max(0, plan.nbytes - plan.present))


def _config(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); is this a model's directory?") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected a JSON object; is this a model's directory?")
    return tree
