"""How large a model is, from its config alone: parameters, bytes, what LoRA adds; no library is loaded for it.

The formulas cover decoders of the Llama kind (gated MLP, grouped attention); tests compare every count with the model
transformers builds on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# model_type → (norms of width `hidden` per layer, biases on q, k and v, norms on each head of q and k)
KINDS = {
    "llama": (2, False, False),
    "mistral": (2, False, False),
    "qwen2": (2, True, False),
    "qwen3": (2, False, True),
    "gemma": (2, False, False),
    "gemma2": (4, False, False),
}
TIED_BY_DEFAULT = ("gemma", "gemma2")
HEAD_DIM_BY_DEFAULT = {"gemma": 256, "gemma2": 256, "qwen3": 128}
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths and counts of one decoder; `dtype_bytes` is what a stored parameter takes."""

    name: str
    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    dtype_bytes: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear of one layer by its name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def embedding(self) -> int:
        """Elements of the table of embeddings, which a tied head shares."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        norms, biased, head_norms = KINDS[self.kind]
        layer = sum(i * o for i, o in self.linears.values()) + norms * self.hidden
        layer += sum(self.linears[n][1] for n in ("q_proj", "k_proj", "v_proj")) if biased else 0
        layer += 2 * self.head_dim if head_norms else 0
        return self.layers * layer + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied by: all but the looked-up embeddings."""
        return self.parameters - (0 if self.tied else self.embedding)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors of a checkpoint."""
        return self.parameters * self.dtype_bytes

    def lora_parameters(self, r: int, target_modules: Sequence[str]) -> int:
        """r · (in + out) for every target of every layer (LoRA, arXiv:2106.09685); unknown targets count nothing."""
        known = [self.linears[name] for name in dict.fromkeys(target_modules) if name in self.linears]
        return self.layers * r * sum(i + o for i, o in known)


def from_config(config: Mapping[str, Any], name: str) -> Shape | None:
    """The shape config.json describes; None for a kind of model the formulas do not cover, or fields not there."""
    kind = str(config.get("model_type"))
    if kind not in KINDS:
        return None
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Shape(
            name=name,
            kind=kind,
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or HEAD_DIM_BY_DEFAULT.get(kind) or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", kind in TIED_BY_DEFAULT)),
            dtype_bytes=DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _published(name: str, kind: str, *numbers: int, tied: bool = False, dtype_bytes: int = 2) -> Shape:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = numbers
    return Shape(
        name=name, kind=kind, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, vocabulary=vocabulary, tied=tied, dtype_bytes=dtype_bytes,
    )  # fmt: skip


# the shapes their makers published, for when no config.json is at hand: hidden, intermediate, layers, heads, key/value
# heads, width of a head, vocabulary
PUBLISHED = {
    shape.name: shape
    for shape in (
        _published("mistralai/Mistral-7B-v0.1", "mistral", 4096, 14336, 32, 32, 8, 128, 32000),
        _published("mistralai/Mistral-7B-v0.3", "mistral", 4096, 14336, 32, 32, 8, 128, 32768),
        _published("meta-llama/Llama-2-7b-hf", "llama", 4096, 11008, 32, 32, 32, 128, 32000),
        _published("meta-llama/Meta-Llama-3-8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256),
        _published("meta-llama/Llama-3.1-8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256),
        # published in float32, unlike the others
        _published("google/gemma-2-9b", "gemma2", 3584, 14336, 42, 16, 8, 256, 256000, tied=True, dtype_bytes=4),
    )
}
