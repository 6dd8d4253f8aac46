"""The size of a model, counted on transformers' model without weights: parameters, linears, LoRA, stored bytes.

The model is built on the meta device from its config alone: a directory's, the hub's, that of params.yaml or a
published one. Any architecture that transformers contains is counted; its weights are neither downloaded nor read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.files.reading import read_json_object
from portllm.errors import CheckpointError
from portllm.lm.names.building import ModelConfig, meta_model
from portllm.params import FetchParams

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WORLD, SCRATCH = "world", "scratch"
CONFIG = "config.json"
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def _published(kind: str, *numbers: int, **options: Any) -> dict[str, Any]:
    """Return a config: widths of a hidden state and of the MLP, layers, heads, key/value heads, a head, vocabulary."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size",
    )  # fmt: skip
    return {"model_type": kind, **dict(zip(names, numbers, strict=True)), "dtype": "bfloat16", **options}


# what their makers published, for when the hub cannot be reached
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _published("mistral", 4096, 14336, 32, 32, 8, 128, 32000),
    "mistralai/Mistral-7B-v0.3": _published("mistral", 4096, 14336, 32, 32, 8, 128, 32768),
    "meta-llama/Llama-2-7b-hf": _published("llama", 4096, 11008, 32, 32, 32, 128, 32000),
    "meta-llama/Meta-Llama-3-8B": _published("llama", 4096, 14336, 32, 32, 8, 128, 128256),
    "meta-llama/Llama-3.1-8B": _published("llama", 4096, 14336, 32, 32, 8, 128, 128256),
    "google/gemma-2-9b": _published("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, dtype="float32"),
}


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The widths of a dense decoder with gated MLPs: what the formulas for activations and times need."""

    hidden: int
    intermediate: int
    layers: int
    queries: int  # heads · width of a head
    keys: int  # key/value heads · width of a head

    @property
    def layer_parameters(self) -> int:
        """The elements of the matrices of all layers: q, k, v, o, and gate, up, down."""
        return self.layers * self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Counts of one model; a tied weight counts once.

    `linears` are (name, inputs, outputs) of each module that LoRA adapts, embeddings among them. `layer_parameters`
    are elements of matrices other than the embeddings and the head; `head_parameters` are those of the head, which
    may be the embeddings. `widths` is None where the formulas do not fit the architecture.
    """

    parameters: int
    layer_parameters: int
    head_parameters: int
    vocabulary: int  # rows of the head
    stored_bytes: int
    dtype_bytes: int
    linears: tuple[tuple[str, int, int], ...]
    widths: Widths | None

    @property
    def multiplied_parameters(self) -> int:
        """The parameters that each token of a dense model is multiplied by: all matrices but the looked-up rows."""
        return self.layer_parameters + self.head_parameters

    def lora_parameters(self, r: int, target_modules: Sequence[str]) -> int:
        """Return r · (inputs + outputs) summed over the modules that PEFT's rule matches (LoRA, arXiv:2106.09685)."""
        matched = (shape for name, *shape in self.linears if any(_matches(name, target) for target in target_modules))
        return r * sum(sum(shape) for shape in matched)

    def unmatched_targets(self, target_modules: Sequence[str]) -> tuple[str, ...]:
        """Return the targets that match no module."""
        return tuple(t for t in target_modules if not any(_matches(name, t) for name, *_ in self.linears))


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """The model of a release: `origin` says where its config is from, `network_bytes` are not on this machine yet.

    `size` is None where it cannot be counted; `reason` then says why.
    """

    name: str
    origin: str
    size: ModelSize | None
    stored_bytes: int | None
    network_bytes: int = 0
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return its values without the list of linears."""
        return {
            "name": self.name,
            "origin": self.origin,
            "parameters": self.size.parameters if self.size else None,
            "stored_bytes": self.stored_bytes,
            "network_bytes": self.network_bytes,
        }


def describe(source: str, fetch: FetchParams) -> SourceModel:
    """Return the model of `source`, named as in `fetch.source`. Raises CheckpointError where there is none."""
    if source in (WORLD, SCRATCH):
        return _sized(ModelConfig(_pretrained_config(source, fetch), "fetch.architecture"), source, "params.yaml")
    folder = Path(source)
    if folder.is_dir():
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return _sized(_read(folder), folder.name, CONFIG, stored=stored)
    return _on_hub(source)


def published(source: str) -> SourceModel:
    """Return what is known of `source` without any file of it: the published config, or no size."""
    name = source.partition("@")[0]
    if name not in PUBLISHED:
        return SourceModel(name=name, origin="no config", size=None, stored_bytes=None, reason="it has no config here")
    model = _sized(ModelConfig(PUBLISHED[name], name), name, "the published shape")
    return replace(model, network_bytes=model.stored_bytes or 0)


def size_of(config: ModelConfig) -> ModelSize:
    """Count the causal language model of `config`. Raises CheckpointError where transformers cannot build it."""
    model = meta_model(config, "CAUSAL_LM")
    own = [p for name, p in model.named_parameters() if name not in model.all_tied_weights_keys]
    heads = _matrices(model.get_output_embeddings())
    outside = {id(matrix) for matrix in (*_matrices(model.get_input_embeddings()), *heads)}
    layer_parameters = sum(p.numel() for p in own if p.ndim > 1 and id(p) not in outside)
    parameters = sum(p.numel() for p in own)
    dtype_bytes = DTYPE_BYTES.get(str(model.config.dtype).removeprefix("torch."), 4)
    stored_names = model.state_dict().keys()
    buffers = sum(b.nbytes for name, b in model.named_buffers() if name in stored_names)
    return ModelSize(
        parameters=parameters,
        layer_parameters=layer_parameters,
        head_parameters=sum(matrix.numel() for matrix in heads),
        vocabulary=max((matrix.shape[0] for matrix in heads), default=0),
        stored_bytes=parameters * dtype_bytes + buffers,
        dtype_bytes=dtype_bytes,
        linears=tuple(_linears(model)),
        widths=_widths(model.config.get_text_config(), layer_parameters),
    )


def _matrices(module: Any) -> list[Any]:
    return [p for p in module.parameters() if p.ndim > 1] if module is not None else []


def _linears(model: PreTrainedModel) -> list[tuple[str, int, int]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linears: list[tuple[str, int, int]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears.append((name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            linears.append((name, module.nx, module.nf))
        elif isinstance(module, nn.Embedding):
            linears.append((name, module.num_embeddings, module.embedding_dim))
    return linears


def _widths(config: PreTrainedConfig, layer_parameters: int) -> Widths | None:
    """Return the widths that `config` names, where a dense decoder of them has as many elements as the model."""
    try:
        heads = int(config.num_attention_heads)
        head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        widths = Widths(
            hidden=int(config.hidden_size),
            intermediate=int(config.intermediate_size),
            layers=int(config.num_hidden_layers),
            queries=heads * head,
            keys=int(getattr(config, "num_key_value_heads", None) or heads) * head,
        )
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return None
    return widths if widths.layer_parameters == layer_parameters else None


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _sized(
    config: ModelConfig, name: str, origin: str, *, stored: int | None = None, network_bytes: int = 0
) -> SourceModel:
    """Count the model of `config`; one that cannot be built has no size."""
    size, reason = None, ""
    try:
        size = size_of(config)
    except CheckpointError as error:
        reason = str(error)
    nbytes = stored if stored is not None else size.stored_bytes if size else None
    return SourceModel(
        name=name, origin=origin, size=size, stored_bytes=nbytes, network_bytes=network_bytes, reason=reason
    )


def _pretrained_config(source: str, fetch: FetchParams) -> dict[str, Any]:
    """Return the config of the Llama that fetch pretrains (see learning/llama.py)."""
    from portllm.world import phrases

    own = fetch.architecture
    special = 3  # padding, end, unknown: see world/tokenizer.py
    return {
        "model_type": "llama",
        "vocab_size": fetch.vocab_size if source == SCRATCH else special + len(phrases.vocabulary()),
        "hidden_size": own.hidden_size,
        "intermediate_size": own.intermediate_size,
        "num_hidden_layers": own.layers,
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.kv_heads or own.heads,
        "tie_word_embeddings": own.tie_word_embeddings,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _on_hub(source: str) -> SourceModel:
    from huggingface_hub import hf_hub_download

    from portllm.lm.remote.hub import HUB_ID, HubRequest

    match = HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source!r}: neither a directory nor a hub id; correct fetch.source")
    repo = match["repo"]
    request = HubRequest(source, repo, match["revision"], False)
    with request.reasons():
        plan = request.plan()
        if plan is None:
            return _sized(_read(request.cached()), repo, "the hub's cache")
        file = Path(hf_hub_download(repo, CONFIG, revision=plan.commit))
    network_bytes = max(0, plan.nbytes - plan.present)
    return _sized(_read(file.parent), repo, f"the hub at {plan.commit[:12]}", network_bytes=network_bytes)


def _read(folder: Path) -> ModelConfig:
    return ModelConfig(read_json_object(folder / CONFIG), folder / CONFIG)
