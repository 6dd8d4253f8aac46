"""Which modules get LoRA, and how much, is what peft itself decides from the same config."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.checkpoint.adapter.targeting import matched, saved_whole, scalings, with_parameters
from portllm.errors import PatchError

pytestmark = pytest.mark.filterwarnings("ignore")  # importing peft warns

LEAVES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.1.down_proj", "mlp.experts.0.w1")
MODULES = [
    *(f"model.layers.{i}.{leaf}" for i in (0, 1, 2, 11) for leaf in LEAVES),
    "q_proj", "layers.1.q_proj", "h.2.q_proj", "lm_head", "model.embed_tokens", "model.lm_head2", "x.lm_head.dense",
    "model.vision.layers.1.q_proj", "score",
]  # fmt: skip


def of_peft(config: dict[str, Any]) -> dict[str, bool]:
    from peft.tuners.tuners_utils import check_target_module_exists

    defaults = {"exclude_modules": None, "modules_to_save": None, "target_modules": None, "target_parameters": None}
    peft_config = SimpleNamespace(**{**defaults, **config})
    return {module: bool(check_target_module_exists(peft_config, module)) for module in MODULES}


TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "mlp.down_proj"]},
    {"target_modules": []},
    {"target_modules": "q_proj"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.\d+\.mlp\..*"},
    {"target_modules": None, "target_parameters": ["a.b"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "q_proj"]},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*experts.*"},
    {"target_modules": ["q_proj", "lm_head", "dense"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["layers.1", "mlp"]},
    *(
        {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": pattern}
        for targets in (["q_proj", "down_proj", "w1"], ["model.layers.0.self_attn.q_proj", "v_proj", "q_proj"])
        for layers in (1, [0, 11], [], [5])
        for pattern in (None, "layers", ["h", "layers"], [], "experts", "model.layers")
    ),
]


@pytest.mark.parametrize("config", TARGETS, ids=str)
def test_targets_are_pefts_own(config: dict[str, Any]) -> None:
    assert matched(config, MODULES) == of_peft(config)


PIECES = st.sampled_from(["model", "layers", "0", "1", "experts", "mlp", "q_proj", "proj", "h", ""])
TAILS = st.lists(PIECES, min_size=1, max_size=4).map(".".join).filter(bool)


@settings(max_examples=200, deadline=None)
@given(
    modules=st.lists(TAILS, min_size=1, max_size=6),
    targets=st.lists(TAILS, max_size=4),
    excluded=st.lists(TAILS, max_size=2),
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 1), max_size=2)),
    pattern=st.sampled_from([None, "layers", ["h", "mlp"]]),
)
def test_lists_of_names_are_matched_as_peft_does(
    modules: list[str], targets: list[str], excluded: list[str], layers: Any, pattern: Any
) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = {
        "target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers,
        "layers_pattern": pattern, "modules_to_save": None, "target_parameters": None,
    }  # fmt: skip
    expected = {module: bool(check_target_module_exists(SimpleNamespace(**config), module)) for module in modules}
    assert matched(config, modules) == expected


def test_without_targets_only_the_excluded_are_known() -> None:
    found = matched({"exclude_modules": ["lm_head"]}, MODULES)
    assert [module for module, hit in found.items() if not hit] == ["lm_head"]


def test_all_linear_leaves_the_output_out() -> None:
    found = matched({"target_modules": "All-Linear"}, MODULES)
    assert [module for module, hit in found.items() if not hit] == ["lm_head", "score"]


RANKS: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 4, "self_attn.q_proj": 5}, "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3}},
    {"rank_pattern": {r"layers\.\d+\.mlp\.experts\.0.*": 7, ".*": 3}, "use_rslora": True},
    {"rank_pattern": {"layers.1": 9}, "alpha_pattern": {r".*layers\.(0|2)\..*": 1.5, "down_proj": 2}},
    {"rank_pattern": None, "alpha_pattern": None},
]


@pytest.mark.parametrize("config", RANKS, ids=str)
def test_ranks_and_scalings_are_pefts_own(config: dict[str, Any]) -> None:
    from peft.utils.other import get_pattern_key

    known = {"r": 2, "lora_alpha": 6, **config}
    found = scalings(known, MODULES)
    for module in MODULES:
        ranks, alphas = config["rank_pattern"] or {}, config.get("alpha_pattern") or {}
        rank = ranks.get(get_pattern_key(ranks.keys(), module), 2)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), 6)
        assert found[module] == (rank, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def test_a_rank_that_no_module_can_have_names_it() -> None:
    with pytest.raises(PatchError, match=r"r of lm_head must be a positive whole number, found 0"):
        scalings({"r": 1, "lora_alpha": 1, "rank_pattern": {"lm_head": 0}}, MODULES)


def test_modules_to_save_are_matched_by_the_end_of_a_name() -> None:
    config = {"modules_to_save": ["norm", "head"]}
    assert saved_whole(config, "model.layers.0.input_layernorm.weight")
    assert saved_whole(config, "lm_head.weight")
    assert saved_whole(config, "model.lm_head.dense.weight")
    assert not saved_whole(config, "model.normal.weight")
    assert not saved_whole({}, "lm_head.weight")


OWNERS = ["layers.0.mlp.experts", "layers.0.mlp", "moreexperts", "experts"]


def test_a_parameter_without_its_module_may_be_anywhere() -> None:
    config = {"target_parameters": ["experts.down_proj", "gate_up_proj", "layers.0.mlp.experts.gate_up_proj"]}
    assert with_parameters(config, OWNERS) == set(OWNERS)
    assert with_parameters({"target_parameters": ["experts.down_proj"]}, OWNERS) == {"layers.0.mlp.experts", "experts"}
    assert with_parameters({"target_parameters": ["0.mlp.experts.x"]}, OWNERS) == {"layers.0.mlp.experts"}
    assert with_parameters({}, OWNERS) == set()
