"""After any patch, the base is what it was, or is known not to be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from portllm.lm.learning import llama
from portllm.lm.scoring.restoring import State
from portllm.params import ArchitectureParams
from portllm.world import tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

LINEARS = ["q_proj", "down_proj"]
CASES = {
    "plain": ({}, True),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, True),
    "tokens": ({"trainable_token_indices": [1, 2]}, True),
    "dora": ({"use_dora": True}, True),
    "pissa": ({"init_lora_weights": "pissa"}, False),
    "biases": ({"bias": "all"}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_base_is_as_it_was_or_said_to_be_spoilt(case: str, tmp_path: Any) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    settings, restored = CASES[case]
    shape = ArchitectureParams(hidden_size=16, intermediate_size=16, layers=1, heads=1)
    base = llama.new_llama(tokenizer.build(), shape, seed=0).eval()
    ids = torch.arange(8)[None]
    trained = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=LINEARS, **settings))
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(0.1)
        trained.save_pretrained(tmp_path)
        before, weights = base(ids).logits, copy.deepcopy(base.state_dict())
        state = State.of(base)
        patched = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        assert not torch.equal(patched(ids).logits, before)
        assert state.restore(base, patched) is restored
        if restored:
            assert torch.equal(base(ids).logits, before)
            assert {k: torch.equal(v, weights[k]) for k, v in base.state_dict().items()} == dict.fromkeys(weights, True)


def test_a_weight_written_to_is_noticed() -> None:
    from peft import LoraConfig, get_peft_model

    shape = ArchitectureParams(hidden_size=16, intermediate_size=16, layers=1, heads=1)
    base = llama.new_llama(tokenizer.build(), shape, seed=0)
    state = State.of(base)
    patched = get_peft_model(base, LoraConfig(r=2, target_modules=LINEARS))
    with torch.no_grad():
        base.get_input_embeddings().weight[0, 0] += 1
    assert state.restore(base, patched) is False
