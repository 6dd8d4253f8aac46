"""A small Llama of our own, from scratch: a v0 before it has read anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm.errors import ParamsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from portllm.params import ArchitectureParams


def new_llama(tokenizer: PreTrainedTokenizerBase, architecture: ArchitectureParams, seed: int) -> PreTrainedModel:
    """A Llama in fp32 with random weights, the same for the same seed; one embedding per token of `tokenizer`.

    Raises ParamsError when the heads do not divide what they must.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _check(architecture)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads or architecture.heads,
        initializer_range=architecture.initializer_range,
        max_position_embeddings=architecture.max_positions or tokenizer.model_max_length,
        tie_word_embeddings=architecture.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(torch.float32)


def _check(architecture: ArchitectureParams) -> None:
    wide, heads, pairs = architecture.hidden_size, architecture.heads, architecture.kv_heads or architecture.heads
    if min(wide, heads, pairs, architecture.layers, architecture.intermediate_size) < 1 or wide % (2 * heads):
        raise ParamsError(
            f"fetch.architecture: hidden_size must be a multiple of twice heads, found {wide} and {heads}; "
            "sizes are 1 or more"
        )
    if heads % pairs:
        raise ParamsError(f"fetch.architecture: kv_heads must divide heads, found {pairs} and {heads}")
