"""evolve to a real release: taken as it is, with what it changed; patches carry over a grown vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import portllm
from portllm.checkpoint.base.comparison import changes, summary
from portllm.checkpoint.record.records import ReleaseRecord
from portllm.cli import main
from portllm.errors import DataError, ParamsError
from portllm.lm.learning.words import byte_pairs
from portllm.params import EvolveParams, ReleaseParams
from portllm.verbs import evolve

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of each other

TEXTS = ["the cat sat on the mat", "a dog ran to the hat"] * 6


def release(folder: Path, seed: int, *, extra: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A tiny Mistral of 270 tokens and `extra` control tokens, as v0.1 and v0.3 of the real one differ."""
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = byte_pairs(TEXTS, 270, 64)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"[control_{i}]" for i in range(extra)]})
    torch.manual_seed(seed)
    settings = {"sliding_window": 4, "rope_theta": 1e4, **config}
    shape = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **settings,
    )  # fmt: skip
    MistralForCausalLM(shape).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(source: str | None) -> EvolveParams:
    return EvolveParams(releases={"v1": ReleaseParams(base="v0", source=source)})


def test_what_a_release_changed_is_recorded(tmp_path: Path) -> None:
    old = release(tmp_path / "old", 0)
    new = release(tmp_path / "new", 1, extra=3, dtype=torch.bfloat16, sliding_window=None)
    found = changes(old, new)
    assert found["vocab_size"] == [270, 273]
    assert found["dtype"] == ["F32", "BF16"]
    assert found["tokens"] == {
        "added": 3, "removed": 0, "renumbered": 0, "examples": ["[control_0]", "[control_1]", "[control_2]"],
    }  # fmt: skip
    assert found["config"]["sliding_window"] == [4, None]
    assert found["shapes"] == dict.fromkeys(["lm_head.weight", "model.embed_tokens.weight"], "270×16 → 273×16")
    assert "tensors" not in found
    assert summary(found).startswith(
        "vocabulary 270 → 273; 3 tokens added; dtype F32 → BF16; 2 shapes changed; config:"
    )
    assert changes(old, old) == {}
    assert summary({}) == "the same shapes, vocabulary and configuration"


def test_tensors_and_tokens_that_came_went_or_moved(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    old = make_checkpoint(tmp_path / "old", {"a": torch.zeros(2), "b": torch.zeros(2)})
    new = make_checkpoint(tmp_path / "new", {"b": torch.zeros(2), "c": torch.zeros(2)})
    assert changes(old, new) == {"tensors": {"added": ["c"], "removed": ["a"]}}, "no tokenizer, nothing said of it"
    (old / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 1, "z": 2}}}))
    unigram = {"model": {"vocab": [["y", -1.0], ["x", -2.0]]}, "added_tokens": [{"id": 2, "content": "w"}]}
    (new / "tokenizer.json").write_text(json.dumps(unigram))
    assert changes(old, new)["tokens"] == {"added": 1, "removed": 1, "renumbered": 2, "examples": ["w"]}


def test_a_real_release_of_the_hub_and_a_patch_carried_onto_it(
    hub: Any, tmp_path: Path, make_patch: Callable[..., Path]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    old, new = release(tmp_path / "old", 0), release(tmp_path / "new", 1, extra=3, sliding_window=None, rope_theta=1e6)
    commit = hub.add("owner/mistral", {path.name: path.read_bytes() for path in new.iterdir()}, branch="v0.3")
    parameters = tmp_path / "params.yaml"
    parameters.write_text("evolve: {releases: {v1: {base: v0, source: owner/mistral@v0.3}}}\n")
    out = tmp_path / "v1"
    words = ["--no-track", "evolve", "--release", "v1", "--params", str(parameters), "--base", str(old)]
    done = CliRunner().invoke(main, [*words, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "owner/mistral against" in done.stderr
    assert "vocabulary 270 → 273; 3 tokens added; 2 shapes changed; config:" in done.stderr
    record = ReleaseRecord.read(out)
    assert record.source is not None
    assert (record.source.name, record.source.revision) == ("owner/mistral", commit)
    assert record.base is not None
    assert record.base.name == "old"
    assert record.changes == changes(old, new)
    asked = len(hub.asked)
    again = CliRunner().invoke(main, [*words[:-1], "owner/absent", "--out", str(out)])
    assert again.exit_code == 1
    assert "pass --force" in again.stderr
    assert len(hub.asked) == asked, "neither the base nor the release was asked for"

    pairs = {
        f"model.layers.0.self_attn.{name}": (torch.randn(2, 16), torch.randn(rows, 2))
        for name, rows in (("q_proj", 16), ("v_proj", 8))
    }
    patch = make_patch(tmp_path / "patch", pairs, target_modules=["q_proj", "v_proj"])
    portllm.port(patch, onto=out, from_=old, out=tmp_path / "ported")
    ids = torch.arange(250, 273)[None]
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), patch)(input_ids=ids).logits
        ported = AutoModelForCausalLM.from_pretrained(tmp_path / "ported")(input_ids=ids).logits
    assert unmerged.shape[-1] == 273
    torch.testing.assert_close(ported, unmerged, rtol=1e-4, atol=1e-4)


def test_a_recipe_must_be_there_and_a_trained_release_needs_a_corpus(tmp_path: Path) -> None:
    assert recipe(None).recipe("v1") == ReleaseParams(base="v0")
    assert recipe(None).recipe(None) is None
    with pytest.raises(ParamsError, match=r"evolve\.releases has no v2; did you mean evolve\.releases\.v1\?"):
        recipe(None).recipe("v2")
    with pytest.raises(ParamsError, match="pass --params FILE"):
        EvolveParams().recipe("v1")
    with pytest.raises(DataError, match=r"--corpus DIR, or set evolve\.releases\.X\.source"):
        evolve.run(base=tmp_path, out=tmp_path / "out", params=recipe(None))
