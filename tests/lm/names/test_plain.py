"""The layout of a plain family, by look-up, equals the one that transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import PLAIN, Layout, plain
from portllm.lm.names.layout import built, layout_of

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {"gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}}


def save(kind: str, folder: Path, **changes: Any) -> Checkpoint:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, **OWN[kind]} if kind in OWN else SIZES
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Checkpoint.open(folder)


def same(one: Layout, other: Layout) -> None:
    assert one.blocks == other.blocks
    assert one.tied == other.tied
    held = {name: module for name, module in other.modules.items() if name in one.modules}
    assert one.modules.keys() == held.keys()
    for name, module in one.modules.items():
        assert dict(module.parameters).items() <= dict(held[name].parameters).items(), name
        if module.kind != "other" or held[name].kind != "other":
            assert module.kind == held[name].kind, name


@pytest.mark.parametrize("kind", sorted(PLAIN))
@pytest.mark.parametrize("tied", [None, True, False])
def test_the_plain_layout_equals_the_built_one(kind: str, tied: bool | None, tmp_path: Path) -> None:
    base = save(kind, tmp_path / kind, **({} if tied is None else {"tie_word_embeddings": tied}))
    same(plain(base), built(base))


def test_a_config_without_tie_word_embeddings(tmp_path: Path) -> None:
    import json

    for kind in sorted(PLAIN):
        base = save(kind, tmp_path / kind)
        tree = json.loads((base.path / "config.json").read_text())
        tree.pop("tie_word_embeddings", None)
        (base.path / "config.json").write_text(json.dumps(tree))
        base = Checkpoint.open(base.path)
        same(plain(base), built(base))


def test_plain_families_cost_no_import_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save("llama", tmp_path / "llama")
    monkeypatch.setattr("portllm.lm.names.layout.built", lambda _: pytest.fail("asked transformers"))
    assert layout_of(base).tied == {}
