"""Whether vLLM accepts an adapter unchanged, determined from its config and the names and ranks of its tensors.

As of vLLM 0.27: ranks from vllm/config/lora.py (`MaxLoRARanks`), the config keys that it reads from
vllm/lora/peft_helper.py, the tensor names from vllm/lora/utils.py. vLLM is not run here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from portllm.checkpoint.files.headers import Header

VERSION = "0.27"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_RANK = 16
FACTOR = re.compile(r".+\.lora_[AB]\.weight|.+\.lora_embedding_[AB]")
RANK = re.compile(r".+\.(lora_A\.weight|lora_embedding_A)")
VOCABULARY = re.compile(r".+\.(embed_tokens|lm_head|wte|embed_in|embed_out)\..+")


@dataclass(frozen=True)
class Serving:
    """The obstacles for vLLM, the rank to configure, and the features that depend on its class of the model."""

    obstacles: tuple[str, ...]
    max_lora_rank: int | None
    depends: tuple[str, ...]


def serving(config: Mapping[str, Any], header: Header) -> Serving:
    """Return vLLM's support for the adapter of `config` and `header`; `max_lora_rank` is None up to vLLM's default."""
    rank = max((e.shape[0] for name, e in header.tensors.items() if RANK.fullmatch(name) and e.shape), default=0)
    needed = next((supported for supported in RANKS if supported >= rank), None)
    depends = []
    if any(VOCABULARY.fullmatch(name) for name in header.tensors):
        depends.append("LoRA on the vocabulary (embedding or head)")
    if config.get("target_parameters"):
        depends.append("LoRA on the parameters of experts")
    return Serving(tuple(_obstacles(config, header, rank)), needed if rank > DEFAULT_RANK else None, tuple(depends))


def _obstacles(config: Mapping[str, Any], header: Header, rank: int) -> Iterator[str]:
    non_factors = {name for name in header.tensors if not FACTOR.fullmatch(name)}
    magnitudes = {name for name in non_factors if "lora_magnitude_vector" in name}
    if config.get("use_dora") or magnitudes:
        yield "it does not take DoRA"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield "it does not take trained biases"
    elif config.get("modules_to_save") or config.get("trainable_token_indices") or non_factors - magnitudes:
        yield "it takes no tensors beside the factors (modules_to_save, trained tokens)"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield "it reads one rank and one alpha for all modules and would scale wrongly (rank_pattern, alpha_pattern)"
    if rank > RANKS[-1]:
        yield f"it takes ranks up to {RANKS[-1]}, this one has {rank}"
