"""Continued pretraining: the base's dtype and names are kept, each weight is rounded once, what is killed goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.errors import DataError, ParamsError
from portllm.lm.learning import llama, pretraining
from portllm.lm.learning.words import byte_pairs
from portllm.params import ArchitectureParams, EvolveParams, FetchParams, LoraParams, OptimParams
from portllm.verbs import evolve, fetch
from portllm.world import tokenizer as world_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of each other

TEXTS = ["the cat sat on the mat", "a dog ran to the hat"] * 12
OPTIM = OptimParams(learning_rate=1e-2, max_steps=4, batch_size=2, logging_steps=1, threads=1, precision="fp32")
SHAPE = ArchitectureParams(hidden_size=16, intermediate_size=24, layers=1, heads=2)
SCRATCH = FetchParams(source="scratch", vocab_size=270, block_length=16, architecture=SHAPE, optim=OPTIM)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    pq.write_table(pa.table({"text": TEXTS}), folder / "train.parquet")
    return folder


def in_dtype(folder: Path, dtype: torch.dtype, *, tied: bool = False) -> Path:
    """A base whose weights are of one dtype but for a norm, which is of another."""
    from safetensors.torch import load_file, save_file

    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    tokenizer = byte_pairs(TEXTS, 270, 16)
    model = llama.new_llama(tokenizer, shape, seed=0).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_base_s_names_dtypes_and_companions_are_kept(tmp_path: Path, corpus: Path, mode: Any, tied: bool) -> None:
    base = in_dtype(tmp_path / "base", torch.bfloat16, tied=tied)
    params = EvolveParams(mode=mode, block_length=16, optim=OPTIM, lora=LoraParams(r=2, alpha=4))
    evolve.run(base=base, corpus=corpus, out=tmp_path / "out", params=params)
    old, new = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    assert {n: (old.entry(n).dtype, old.entry(n).shape) for n in old.names} == {
        n: (new.entry(n).dtype, new.entry(n).shape) for n in new.names
    }
    assert old.entry("model.norm.weight").dtype == "F32"
    assert ("lm_head.weight" in new.names) != tied
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_every_weight_is_rounded_once(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    base = in_dtype(tmp_path / "base", torch.bfloat16)
    params = EvolveParams(mode=mode, block_length=16, optim=OPTIM, lora=LoraParams(r=2, alpha=4, dropout=0.0))
    made = pretraining.continued(base, corpus, params)
    old = Checkpoint.open(base)
    if mode == "full":
        exact = {name: p.detach().double().clone() for name, p in made.model.named_parameters()}
    else:
        exact = {name: old.entry(name).read().double() for name in old.names}
        for name, module in made.model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                a, b = (side["default"].weight.detach().double() for side in (module.lora_A, module.lora_B))
                exact[f"{name}.weight"] = exact[f"{name}.weight"] + 2 * b @ a
    folder = tmp_path / "out"
    folder.mkdir()
    made.save(folder)
    new = Checkpoint.open(folder)
    assert set(new.names) == set(exact)
    for name, tensor in exact.items():
        kind = new.entry(name).read().dtype
        # to fp32 first: it holds what a double does here but for ties, which these sums do not meet
        assert torch.equal(new.entry(name).read(), tensor.float().to(kind)), name


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_where_the_model_is_sharded_the_gathered_weights_are_saved(
    tmp_path: Path, corpus: Path, mode: Any, tied: bool
) -> None:
    base = in_dtype(tmp_path / "base", torch.float32, tied=tied)
    params = EvolveParams(mode=mode, block_length=16, optim=OPTIM, lora=LoraParams(r=2, alpha=4, dropout=0.0))
    made = pretraining.continued(base, corpus, params)
    weights = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
    folders = [tmp_path / "whole", tmp_path / "gathered"]
    for folder in folders:
        folder.mkdir()
    made.save(folders[0])
    for parameter in made.model.parameters():
        parameter.data.zero_()  # what is left here of a sharded model is no use
    dataclasses.replace(made, weights=weights).save(folders[1])
    whole, gathered = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert whole == gathered


def test_the_other_processes_write_nothing(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = in_dtype(tmp_path / "base", torch.float32)
    made = pretraining.continued(base, corpus, EvolveParams(block_length=16, optim=OPTIM))
    monkeypatch.setattr("portllm.processes.is_main", lambda: False)
    folder = tmp_path / "out"
    folder.mkdir()
    made.save(folder)
    assert list(folder.iterdir()) == []
    assert made.fingerprint(folder) == ""


def test_a_lora_on_a_tied_head_unties_it(tmp_path: Path, corpus: Path) -> None:
    base = in_dtype(tmp_path / "base", torch.float32, tied=True)
    lora = LoraParams(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "lm_head"))
    params = EvolveParams(mode="lora", block_length=16, optim=OPTIM, lora=lora)
    made = pretraining.continued(base, corpus, params)
    folder = tmp_path / "out"
    folder.mkdir()
    made.save(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    old, new = Checkpoint.open(base), Checkpoint.open(folder)
    assert torch.equal(old.entry("model.embed_tokens.weight").read(), new.entry("model.embed_tokens.weight").read())
    assert not torch.equal(new.entry("lm_head.weight").read(), new.entry("model.embed_tokens.weight").read())
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        torch.testing.assert_close(merged, made.model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_from_scratch_twice_is_the_same_and_counts_its_tokens(tmp_path: Path, corpus: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        torch.manual_seed(torch.initial_seed() + 1)  # whatever ran before must not matter
        record = fetch.run(out=folder, params=SCRATCH, corpus=corpus)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two
    tokenizer = byte_pairs(TEXTS, 270, 16)
    tokens = sum(len(ids) + 1 for ids in tokenizer(TEXTS)["input_ids"])
    counted = {k: record.metrics[k] for k in ("documents", "blocks", "tokens_dropped")}
    assert counted == {"documents": 24, "blocks": tokens // 16, "tokens_dropped": tokens % 16}
    assert json.loads(one["config.json"])["max_position_embeddings"] == 16
    assert record.probe == {}


def test_an_architecture_that_cannot_be_is_refused(tmp_path: Path, corpus: Path) -> None:
    for wrong, says in (
        ({"heads": 3}, "multiple of twice heads, found 16 and 3"),
        ({"kv_heads": 4}, "kv_heads must divide heads, found 4 and 2"),
        ({"layers": 0}, "sizes are 1 or more"),
    ):
        params = dataclasses.replace(SCRATCH, architecture=dataclasses.replace(SHAPE, **wrong))
        with pytest.raises(ParamsError, match=says):
            fetch.run(out=tmp_path / "out", params=params, corpus=corpus)
    with pytest.raises(DataError, match="source scratch is pretrained; pass its corpus"):
        fetch.run(out=tmp_path / "out", params=SCRATCH)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_was_killed_goes_on_to_the_same_weights(tmp_path: Path, corpus: Path, mode: Any) -> None:
    base = in_dtype(tmp_path / "base", torch.float32)
    optim = dataclasses.replace(OPTIM, save_steps=1)
    params = EvolveParams(mode=mode, block_length=16, optim=optim, lora=LoraParams(r=2, alpha=4, dropout=0.1))
    whole = evolve.run(base=base, corpus=corpus, out=tmp_path / "whole", params=params)

    class Killed(BaseException):
        pass

    def kill(step: int, _: Any) -> None:
        if step == 3:
            raise Killed

    notes: list[str] = []
    with pytest.raises(Killed):
        evolve.run(
            base=base,
            corpus=corpus,
            out=tmp_path / "out",
            params=params,
            training=pretraining.TrainingCallbacks(on_metrics=kill),
        )
    assert not (tmp_path / "out").exists()
    callbacks = pretraining.TrainingCallbacks(on_note=notes.append)
    assert evolve.run(base=base, corpus=corpus, out=tmp_path / "out", params=params, training=callbacks) == whole
    assert any("going on after step 2" in note for note in notes)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "whole", "out"}


class Successor(torch.nn.Module):
    """A model whose likeliest token after t is t + 1."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids + 1, 600).float())


def test_probe_counts_greedy_continuations() -> None:
    words = world_tokenizer.build()

    def text(*ids: int) -> str:
        return words.decode(ids)

    right, long, wrong, half = (
        (text(20, 21), text(22)),
        (text(30), text(31, 32, 33)),
        (text(20, 21), text(23)),
        (text(30), text(31, 33)),
    )
    model = Successor().train()
    assert pretraining.share_answered(model, words, [right, long]) == 1.0
    assert pretraining.share_answered(model, words, [right, wrong]) == 0.5
    assert pretraining.share_answered(model, words, [right, long, wrong, half] * 40) == 0.5
    assert model.training


def test_probe_without_prompts_is_zero() -> None:
    assert pretraining.share_answered(Successor(), world_tokenizer.build(), []) == pytest.approx(0.0)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_release_that_equals_its_base_is_noted(tmp_path: Path, corpus: Path, mode: Any) -> None:
    """Issue 8, item 1: a learning rate of 0 changes nothing."""
    base = in_dtype(tmp_path / "base", torch.float32)
    for rate, noted in ((0.0, True), (1e-2, False)):
        notes: list[str] = []
        optim = dataclasses.replace(OPTIM, learning_rate=rate)
        params = EvolveParams(mode=mode, block_length=16, optim=optim, lora=LoraParams(r=2, alpha=4))
        evolve.run(
            base=base, corpus=corpus, out=tmp_path / f"out-{rate}", params=params,
            training=pretraining.TrainingCallbacks(on_note=notes.append),
        )  # fmt: skip
        assert [note.startswith("the release equals its base: no weight changed") for note in notes] == [True] * noted


@pytest.mark.parametrize("verb", ["fetch", "evolve full", "evolve lora"])
def test_pretraining_that_diverges_leaves_nothing(tmp_path: Path, corpus: Path, verb: str) -> None:
    """Issue 8, item 1, with snapshots of the steps before."""
    base, out = in_dtype(tmp_path / "base", torch.float32), tmp_path / "out"
    optim = dataclasses.replace(OPTIM, learning_rate=1e30, max_steps=6, save_steps=1, max_grad_norm=0.0)
    scratch = dataclasses.replace(SCRATCH, optim=optim)
    further = EvolveParams(mode="full", block_length=16, optim=optim, lora=LoraParams(r=2, alpha=4))
    run = {
        "fetch": lambda: fetch.run(out=out, params=scratch, corpus=corpus),
        "evolve full": lambda: evolve.run(base=base, corpus=corpus, out=out, params=further),
        "evolve lora": lambda: evolve.run(
            base=base, corpus=corpus, out=out, params=dataclasses.replace(further, mode="lora")
        ),
    }[verb]
    with pytest.raises(ParamsError, match=r"lower optim\.learning_rate"):
        run()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weight_beyond_the_base_s_dtype_is_an_error(tmp_path: Path, corpus: Path) -> None:
    """Issue 8, item 1: finite in fp32, in which it is trained, and infinite in the fp16 of the base."""
    base = in_dtype(tmp_path / "base", torch.float16)
    optim = dataclasses.replace(OPTIM, learning_rate=1e5, max_steps=1)
    with pytest.raises(ParamsError, match=r"range of the base's dtype torch.float16, found one beyond it; lower"):
        evolve.run(base=base, corpus=corpus, out=tmp_path / "out", params=EvolveParams(block_length=16, optim=optim))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
