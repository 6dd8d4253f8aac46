"""A base loaded for training: in which precision, with which attention, quantised or not."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import CheckpointError, MachineError, ParamsError
from portllm.lm.opening import refusals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from portllm.params import OptimParams

FOUR_BITS = "4bit"
NF4 = "bitsandbytes-nf4"  # as patch.json names it


def computes_in(precision: str) -> str:
    """`fp32` or `bf16`: what is asked for, or with `auto` what this machine is best at. Raises MachineError."""
    import torch

    if precision == "fp32":
        return precision
    # emulated, which older GPUs can do, it is slower than fp32
    able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and torch.cuda.is_available() and not able:
        raise MachineError("optim.precision: bf16 needs a GPU of NVIDIA's Ampere or a later kind; use fp32")
    return "bf16" if able or precision == "bf16" else "fp32"


def frozen_base(base: Path, optim: OptimParams, quantization: str = "none") -> PreTrainedModel:
    """The model at `base` to put a LoRA on: its weights in the precision that is computed in, or in 4 bits.

    Raises CheckpointError and MachineError.
    """
    import torch

    kind = torch.bfloat16 if computes_in(optim.precision) == "bf16" else torch.float32
    if quantization != FOUR_BITS:
        return _load(base, optim, dtype=kind)
    from peft import prepare_model_for_kbit_training

    model = _load(base, optim, **_in_four_bits(kind))
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def trainable_base(base: Path, optim: OptimParams) -> PreTrainedModel:
    """The model at `base` to train whole: fp32 weights, whatever is computed in, as small steps vanish in bf16."""
    import torch

    return _load(base, optim, dtype=torch.float32)


def tokenizer_of(base: Path) -> PreTrainedTokenizerBase:
    """The tokenizer at `base`. Raises CheckpointError when it has none that can be read."""
    from transformers import AutoTokenizer

    with refusals(base, CheckpointError, "no readable tokenizer ({}); fetch the base again"):
        return AutoTokenizer.from_pretrained(base)


def attention_for(config: Any, optim: OptimParams) -> str | None:
    """What to hand transformers as attn_implementation; None: its own choice, sdpa where the model has it.

    Raises MachineError for flash_attention_2 where it is not installed, ParamsError where fp32 is computed in.
    """
    wanted = optim.attention
    if wanted == "auto":
        # soft-capped logits (Gemma 2, arXiv:2408.00118): sdpa cannot cap them, and would train another model
        return "eager" if getattr(config, "attn_logit_softcapping", None) else None
    if wanted == "flash_attention_2":
        import torch

        if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
            raise MachineError(
                "optim.attention: flash_attention_2 needs a CUDA GPU and the package flash-attn, which this machine "
                "lacks; install it, or use attention: auto"
            )
        if computes_in(optim.precision) == "fp32":
            raise ParamsError(
                "optim.attention: flash_attention_2 computes in bf16, found fp32; use precision: bf16, or auto"
            )
    return wanted


def _load(base: Path, optim: OptimParams, **options: Any) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with refusals(base, CheckpointError, "cannot be loaded for training ({}); is it a whole base?"):
        wanted = attention_for(AutoConfig.from_pretrained(base), optim)
        return AutoModelForCausalLM.from_pretrained(
            base, attn_implementation=wanted, use_safetensors=True, trust_remote_code=False, **options
        )


def _in_four_bits(kind: Any) -> dict[str, Any]:
    """How from_pretrained quantises: NF4 with double quantisation (QLoRA, arXiv:2305.14314). Raises MachineError."""
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            "train.quantization: 4bit needs a CUDA GPU, which this machine lacks; use quantization: none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            "train.quantization: 4bit needs the package bitsandbytes; install the extra portllm[gpu], or use none"
        )
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
        bnb_4bit_quant_storage=kind,  # a floating type: FSDP can shard no other
    )
    return {
        "quantization_config": quantised,
        "dtype": kind,
        "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))},
    }
