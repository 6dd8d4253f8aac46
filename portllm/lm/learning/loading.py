"""A base made ready for training: its precision, attention and quantisation, its tokenizer, a fresh LoRA on it."""

from __future__ import annotations

import difflib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import CheckpointError, MachineError, ParamsError
from portllm.lm.opening import refusals

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from portllm.params import LoraParams, OptimParams

FOUR_BITS = "4bit"
NF4 = "bitsandbytes-nf4"  # the name in patch.json


def computes_in(precision: str) -> str:
    """Return `fp32` or `bf16`: `precision` itself, or for `auto` the best of this machine. Raises MachineError."""
    import torch

    if precision == "fp32":
        return precision
    # older GPUs emulate bf16, slower than they compute fp32
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and torch.cuda.is_available() and not has_bf16:
        raise MachineError("optim.precision: bf16 needs a GPU of NVIDIA's Ampere or a later kind; use fp32")
    return "bf16" if has_bf16 or precision == "bf16" else "fp32"


def frozen_base(base: Path, optim: OptimParams, quantization: str = "none") -> PreTrainedModel:
    """Load the model at `base` to put a LoRA on: its weights in the precision of the computation, or in 4 bits.

    Raises CheckpointError and MachineError.
    """
    import torch

    dtype = torch.bfloat16 if computes_in(optim.precision) == "bf16" else torch.float32
    if quantization != FOUR_BITS:
        return _load(base, optim, dtype=dtype)
    from peft import prepare_model_for_kbit_training

    model = _load(base, optim, **_in_four_bits(dtype))
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def trainable_base(base: Path, optim: OptimParams) -> PreTrainedModel:
    """Load the model at `base` to train all its weights: in fp32, because small steps vanish in bf16."""
    import torch

    return _load(base, optim, dtype=torch.float32)


def tokenizer_of(base: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer at `base`. Raises CheckpointError when there is none, or none that can be read."""
    from transformers import AutoTokenizer

    with refusals(base, CheckpointError, "no readable tokenizer ({}); fetch the base again"):
        return AutoTokenizer.from_pretrained(base)


def add_lora(model: PreTrainedModel, lora: LoraParams, seed: int) -> PeftModel:
    """Return `model` with a fresh LoRA (arXiv:2106.09685) on every target module; only the LoRA is trainable.

    Raises ParamsError for a target that matches no module that LoRA adapts: PEFT ignores it while another matches.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora.target_modules)
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # a list, not a set: the order is written into adapter_config.json
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
    )
    with warnings.catch_warnings():
        # PEFT reads a property that transformers is renaming
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ParamsError(f"lora.target_modules: PEFT refuses them ({_line(error)}); name other modules") from error


def attention_for(config: Any, optim: OptimParams) -> str | None:
    """Return transformers' attn_implementation; None for its own choice, sdpa where the model has it.

    Raises MachineError for flash_attention_2 where it is not installed, ParamsError where the computation is in fp32.
    """
    attention = optim.attention
    if attention == "auto":
        # soft-capped logits (Gemma 2, arXiv:2408.00118): sdpa cannot cap them, and would train another model
        return "eager" if getattr(config, "attn_logit_softcapping", None) else None
    if attention == "flash_attention_2":
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
    return attention


def _check_targets(model: Module, targets: Sequence[str]) -> None:
    """Raise ParamsError for the first target that matches no linear or embedding of `model`, by PEFT's rule."""
    if not targets:
        raise ParamsError("lora.target_modules: expected the name of a module or more, found none; add one")
    names = [name for name, module in model.named_modules() if isinstance(module, _adaptable_types())]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        available = sorted({name.rpartition(".")[2] for name in names})
        nearest = difflib.get_close_matches(target.rpartition(".")[2], available, n=2, cutoff=0.5)
        question = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise ParamsError(
            f"lora.target_modules: {target} matches no module of the base that LoRA adapts; {question}"
            f"The base has {', '.join(available)}."
        )


def _adaptable_types() -> tuple[type[Module], ...]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def _load(base: Path, optim: OptimParams, **options: Any) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with refusals(base, CheckpointError, "cannot be loaded for training ({}); is it a whole base?"):
        attention = attention_for(AutoConfig.from_pretrained(base), optim)
        return AutoModelForCausalLM.from_pretrained(
            base, attn_implementation=attention, use_safetensors=True, trust_remote_code=False, **options
        )


def _in_four_bits(dtype: Any) -> dict[str, Any]:
    """Return from_pretrained's options for NF4 with double quantisation (QLoRA, arXiv:2305.14314).

    Raises MachineError.
    """
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
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # a floating type: FSDP can shard no other
    )
    return {
        "quantization_config": quantised,
        "dtype": dtype,
        "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))},
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
