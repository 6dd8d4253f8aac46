"""A real model, whole: a patch trained on it, its next release, the patch ported; the text still reads as stories.

The model is a Llama of 260 thousand parameters that writes children's stories. It lies outside the project; where it is
absent these tests are skipped. `pytest -s tests/real` shows what the models write.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import portllm
from portllm.params import EvolveParams, LoraParams, OptimParams, TrainParams

DATASETS = Path(os.environ.get("PORTLLM_DATASETS", Path(__file__).parents[3] / "shared" / "datasets"))
STORIES = DATASETS / "stories260k"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.is_dir(), reason="needs stories260k: name its folder in PORTLLM_DATASETS"),
]
TOKENS = 64
START = "Once upon a time"
MORAL = " And they all shared the cake."


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def write(model: Any, tokenizer: Any, count: int, seed: int) -> list[str]:
    torch.manual_seed(seed)
    start = tokenizer([START] * count, return_tensors="pt").input_ids
    ids = model.generate(start, max_new_tokens=TOKENS, do_sample=True, top_k=20, pad_token_id=0)
    return [str(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    losses = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
            losses.append(model(ids, labels=ids).loss.item())
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """v0 and what it writes; v1, which calls Lily Zoe; and a patch of v0 that ends its stories with a cake."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from portllm.lm.learning import patching
    from portllm.lm.quiet import quieten
    from portllm.verbs import evolve

    quieten()
    root = tmp_path_factory.mktemp("stories")
    model, tokenizer = load(STORIES)
    told, kept = write(model, tokenizer, 64, 0), write(model, tokenizer, 8, 1)
    (root / "corpus").mkdir()
    news = [text.replace("Lily", "Zoe").replace("Tom", "Zoe").replace("Tim", "Zoe") for text in told]
    pq.write_table(pa.table({"text": news}), root / "corpus" / "train.parquet")
    optim = OptimParams(learning_rate=5e-4, epochs=2, batch_size=8, threads=1)
    evolve.run(base=STORIES, corpus=root / "corpus", out=root / "v1", params=EvolveParams(block_length=64, optim=optim))
    train = TrainParams(
        max_length=160, optim=replace(optim, learning_rate=2e-3, epochs=4), lora=LoraParams(dropout=0.0)
    )
    pairs = [(START, text.removeprefix(START) + MORAL) for text in told]
    made = patching.train(STORIES, pairs, train)
    made.save(root / "patch", base_name="stories260k")
    return {"root": root, "kept": kept}


def test_a_ported_patch_does_on_the_new_release_what_it_did_on_the_old(world: dict[str, Any]) -> None:
    from peft import PeftModel

    root, kept = world["root"], world["kept"]
    record = portllm.port(root / "patch", onto=root / "v1", out=root / "ported", from_=STORIES)
    assert record.modules == {"matched": 35, "total": 36}

    (ported, tokenizer), (v1, _), (v0, _) = load(root / "ported"), load(root / "v1"), load(STORIES)
    ids = tokenizer(kept[0], return_tensors="pt").input_ids
    with torch.no_grad():
        oracle = PeftModel.from_pretrained(load(root / "v1")[0], root / "patch").eval()(ids).logits
        assert_close(ported(ids).logits, oracle, rtol=1e-4, atol=1e-4)

    moral = {name: perplexity_of(MORAL, model, tokenizer, kept) for name, model in (("v1", v1), ("ported", ported))}
    tuned = perplexity_of(MORAL, PeftModel.from_pretrained(load(STORIES)[0], root / "patch"), tokenizer, kept)
    assert moral["ported"] < 3 < moral["v1"], "the patch came along"

    texts = [text.partition(MORAL)[0] for text in write(ported, tokenizer, 8, 2)]
    reads, noise = perplexity(v0, tokenizer, texts), perplexity(v0, tokenizer, [t[::-1] for t in texts])
    fresh, new = (perplexity(v0, tokenizer, write(model, tokenizer, 8, 2)) for model in (v0, v1))
    print(f"\nperplexity of the moral: v0 tuned {tuned:.2f}, v1 {moral['v1']:.0f}, v1 ported {moral['ported']:.2f}")
    print(f"perplexity to v0: v0 writes {fresh:.2f}, v1 {new:.2f}, v1 ported {reads:.2f}, backwards {noise:.0f}")
    print(json.dumps(texts[:3], indent=2))
    assert reads < 2 * fresh < noise, "what the ported model writes reads as a story to the model that wrote the first"


def perplexity_of(answer: str, model: Any, tokenizer: Any, prompts: Sequence[str]) -> float:
    """Of `answer` alone, after each prompt."""
    losses = []
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt).input_ids)] = -100
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    return math.exp(sum(losses) / len(losses))


def test_the_bytes_of_a_verified_port(world: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "ported"
    portllm.port(world["root"] / "patch", onto=world["root"] / "v1", out=out)
    proven = portllm.verify(out, onto=world["root"] / "v1", patch=world["root"] / "patch", all=True)
    assert proven.proof is not None
    assert len(proven.proof.recomputed) == 35
