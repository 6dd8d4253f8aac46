"""Whatever names a file holds and whatever its config says: every tensor has one place, or the patch is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.checkpoint.adapter.classification import Contents, sort_out
from portllm.checkpoint.files.headers import Header
from portllm.checkpoint.files.tensors import TensorEntry, TensorFile
from portllm.errors import PatchError

MODULES = ("model.embed_tokens", "lm_head", "layers.0.q_proj", "layers.1.q_proj", "layers.0.experts", "score")
FACTORS = {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2), "lora_embedding_A": (2, 4), "lora_embedding_B": (4, 2)}
PARTS = {
    **FACTORS, "lora_magnitude_vector": (4,), "lora_magnitude_vector.weight": (4,), "lora_B.bias": (4,),
    "base_layer.lora_A.weight": (2, 4), "base_layer.lora_B.weight": (4, 2), "base_layer.weight": (4, 4),
    "base_layer.bias": (4,), "base_layer.base_layer.weight": (4, 4), "base_layer.base_layer.bias": (4,),
    "weight": (4, 4), "bias": (4,), "original_module.weight": (4, 4), "modules_to_save.weight": (4, 4),
    "token_adapter.trainable_tokens_delta": (2, 4), "token_adapter.base_layer.weight": (4, 4),
    "token_adapter.base_layer.bias": (4,), "base_layer.dense.lora_A.weight": (2, 4), "lora_A.default.weight": (2, 4),
}  # fmt: skip
GROUPS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.weight", "lora_B.weight", "base_layer.lora_A.weight", "base_layer.lora_B.weight"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_A.weight", "lora_B.weight", "base_layer.weight"),
    ("lora_A.weight", "lora_B.weight", "base_layer.bias"),
    ("weight",),
    ("weight", "original_module.weight", "modules_to_save.weight"),
    ("token_adapter.trainable_tokens_delta",),
    (),
)
NAMES = st.tuples(
    st.dictionaries(st.sampled_from(MODULES), st.sampled_from(GROUPS), min_size=1, max_size=2),
    st.tuples(st.sampled_from(MODULES), st.one_of(st.none(), st.sampled_from(sorted(PARTS)))),
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "target_modules": st.sampled_from([["q_proj", "lm_head"], ["q_proj", "embed_tokens", "score"], "all-linear"]),
        "target_parameters": st.sampled_from([["experts.down_proj"], ["down_proj"]]),
        "modules_to_save": st.sampled_from([["lm_head"], ["score", "embed_tokens"], ["head"]]),
        "bias": st.sampled_from(["all", "lora_only"]),
        "ensure_weight_tying": st.just(True),
        "trainable_token_indices": st.sampled_from(
            [[0, 1], {"lm_head": [0, 1]}, {"lm_head": [0, 1], "tokens": [2, 3]}]
        ),
    },
)


def header(names: dict[str, tuple[int, ...]]) -> Header:
    file = TensorFile(Path("adapter_model.safetensors"), 8, 8)
    entries = {name: TensorEntry(name, "F32", shape, 0, 0, file) for name, shape in names.items()}
    return Header(Path("adapter_model.safetensors"), 8, 8, entries, {})


def held(contents: Contents) -> Counter[str]:
    pairs = [*contents.modules.values(), *(pair for stack in contents.stacks.values() for pair in stack)]
    entries = [entry for p in pairs for entry in (p.a_entry, p.b_entry, p.magnitude, p.bias) if entry is not None]
    entries += [rows.entry for rows in contents.tokens.values()]
    entries += [*contents.replaced.values(), *contents.saved.values(), *contents.idle.values()]
    return Counter(entry.name for entry in entries)


@settings(max_examples=600, deadline=None)
@given(chosen=NAMES, config=CONFIGS)
def test_every_tensor_has_one_place(chosen: Any, config: dict[str, Any]) -> None:
    groups, (module, more) = chosen
    found = [(owner, part) for owner, group in groups.items() for part in group] + ([(module, more)] if more else [])
    names = {f"base_model.model.{owner}.{part}": PARTS[part] for owner, part in found}
    try:
        contents = sort_out({"r": 2, "lora_alpha": 4, **config}, header(names))
    except PatchError as error:
        assert "\n" not in str(error)  # noqa: PT017 - refusing is right too
        return
    assert held(contents) == Counter(list(names))
    assert contents.follows_tie <= contents.modules.keys() | {
        name.removesuffix(".weight") for name in contents.replaced
    }


@pytest.mark.parametrize("group", ["base_layer.weight", "token_adapter.base_layer.weight"])
def test_two_copies_of_one_weight_are_refused(group: str) -> None:
    shapes = {f"base_model.model.lm_head.{part}": PARTS[part] for part in ("lora_A.weight", "lora_B.weight", group)}
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]}
    if group == "base_layer.weight":
        assert held(sort_out(config, header(shapes))) == Counter(list(shapes))
        shapes[f"base_model.model.lm_head.base_layer.{group}"] = (4, 4)
    with pytest.raises(PatchError, match="has [01] of LoRA's wrappers"):
        sort_out(config, header(shapes))


def test_a_module_with_lora_has_no_trained_rows() -> None:
    parts = ("lora_A.weight", "lora_B.weight", "token_adapter.trainable_tokens_delta")
    shapes = {f"base_model.model.lm_head.{part}": PARTS[part] for part in parts}
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head"], "trainable_token_indices": {"lm_head": [0, 1]}}
    with pytest.raises(PatchError, match="PEFT trains no rows next to it"):
        sort_out(config, header(shapes))
