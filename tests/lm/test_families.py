"""The families people come with, as tiny models of their real classes: fetched, evolved, trained, ported, compared.

The oracle is PEFT's unmerged adapter on the evolved release.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.testing import assert_close

import portllm
from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.lm.learning import loading, patching
from portllm.lm.learning.words import byte_pairs
from portllm.params import EvolveParams, FetchParams, LoraParams, OptimParams, TrainParams
from portllm.verbs import evolve, fetch

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of each other

TEXTS = ["the cat sat on the mat", "a dog ran to the hat", "is the cat on the mat? yes", "12 and 3 is 15"] * 6
PAIRS = [("is the cat on the mat?", " yes"), ("is the dog on the mat?", " no"), ("12 and 3 is", " 15")]
OPTIM = OptimParams(learning_rate=1e-2, max_steps=2, batch_size=2, logging_steps=1, threads=1, precision="fp32")
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip


def mistral() -> Any:
    from transformers import MistralConfig

    # v0.1's sliding window, short enough to matter
    return MistralConfig(num_key_value_heads=2, sliding_window=4, rope_theta=1e4, **SIZES)


def llama2() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(num_key_value_heads=4, rms_norm_eps=1e-5, **{**SIZES, "head_dim": 4})


def llama3() -> Any:
    from transformers import LlamaConfig

    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    return LlamaConfig(num_key_value_heads=2, rope_parameters=scaling, **SIZES)


def gemma2() -> Any:
    from transformers import Gemma2Config

    # both soft caps low enough to bite
    return Gemma2Config(
        num_key_value_heads=2, sliding_window=4, attn_logit_softcapping=0.5, final_logit_softcapping=0.5,
        query_pre_attn_scalar=8, **SIZES,
    )  # fmt: skip


def qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(num_key_value_heads=2, tie_word_embeddings=True, **SIZES)


FAMILIES: dict[str, tuple[Callable[[], Any], bool]] = {
    # whether its tokenizer opens texts with BOS
    "mistral": (mistral, True),
    "llama2": (llama2, True),
    "llama3": (llama3, True),
    "gemma2": (gemma2, True),
    "qwen3": (qwen3, False),
}


def words(*, opens: bool) -> Any:
    from tokenizers import processors

    made = byte_pairs(TEXTS, 280, 64)
    if opens:
        made.add_special_tokens({"bos_token": "<s>"})
        template = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.bos_token_id)]
        )
        made.backend_tokenizer.post_processor = template
    return made


def published(folder: Path, family: str) -> Path:
    """A base as its makers publish it."""
    from transformers import AutoModelForCausalLM

    config, opens = FAMILIES[family][0](), FAMILIES[family][1]
    tokenizer = words(opens=opens)
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, tokenizer.bos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    pq.write_table(pa.table({"text": TEXTS}), folder / "train.parquet")
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_carries_to_the_next_release(family: str, corpus: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    source = published(tmp_path / "published", family)
    v0 = tmp_path / "v0"
    fetch.run(out=v0, params=FetchParams(source=str(source)))
    for path in source.iterdir():
        assert (v0 / path.name).read_bytes() == path.read_bytes()

    lora = LoraParams(r=2, alpha=4, dropout=0.0)
    made = patching.train(v0, PAIRS, TrainParams(lora=lora, optim=OPTIM))
    made.save(tmp_path / "patch", base_name="v0")

    for mode in ("lora", "full"):
        v1 = tmp_path / mode
        params = EvolveParams(mode=mode, block_length=16, optim=OPTIM, lora=dataclasses.replace(lora, r=4))  # type: ignore[arg-type]
        record = evolve.run(base=v0, corpus=corpus, out=v1, params=params)
        old, new = Checkpoint.open(v0), Checkpoint.open(v1)
        assert old.names == new.names, "a tied head stays tied"
        assert (v1 / "config.json").read_bytes() == (v0 / "config.json").read_bytes()
        changed = {name for name in old.names if not torch.equal(old.entry(name).read(), new.entry(name).read())}
        linears = {name for name in old.names if name.split(".")[-2] in lora.target_modules}
        assert changed >= linears
        assert mode == "full" or changed == linears
        assert record.base is not None
        assert record.base.name == "v0"

        ported = tmp_path / f"{mode}-ported"
        portllm.port(tmp_path / "patch", onto=v1, out=ported)
        plain = loading.trainable_base(v1, OPTIM)
        bare = logits(plain)
        patched = logits(PeftModel.from_pretrained(plain, tmp_path / "patch"))
        assert (patched - bare).abs().max() > 1e-3
        assert_close(logits(loading.trainable_base(ported, OPTIM)), patched, rtol=1e-4, atol=1e-5)
