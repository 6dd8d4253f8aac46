"""What peft writes, a patch says again: every tensor placed, every update, magnitude and row as peft computes it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from portllm.checkpoint.adapter.factors import LoraPair, factors
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.adapter.targeting import stack_pairs
from portllm.errors import UnmatchedModulesError, UnsupportedPatchError

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about what these tests do on purpose

Adapt = Callable[..., tuple[Any, Patch]]
SMALL = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    """A tiny seeded model: llama, tied, classifier, gpt2, mixtral, gpt_oss or square (experts as wide as the model)."""
    import transformers as t

    torch.manual_seed(0)
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    if name in ("mixtral", "square"):
        wide = {"intermediate_size": 4} if name == "square" else {}
        config = t.MixtralConfig(**{**SMALL, "num_local_experts": 3, "num_hidden_layers": 1, **wide})
        return t.MixtralForCausalLM(config)
    if name == "gpt_oss":
        return t.GptOssForCausalLM(t.GptOssConfig(**{**SMALL, "num_local_experts": 3, "head_dim": 4}))
    kind = t.LlamaForSequenceClassification if name == "classifier" else t.LlamaForCausalLM
    labels = {"num_labels": 3} if name == "classifier" else {}
    return kind(t.LlamaConfig(**{**SMALL, **labels, "tie_word_embeddings": name == "tied", **changes}))


@pytest.fixture
def adapt(tmp_path: Path) -> Adapt:
    """adapt(model, target_modules=…, save=…): (peft model with random factors, the patch that it saved)."""

    def make(model: Any, *, save: Mapping[str, Any] | None = None, **config: Any) -> tuple[Any, Patch]:
        from peft import LoraConfig, get_peft_model

        peft_model = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 4, **config}))
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                torch.nn.init.normal_(parameter.data)
        peft_model.save_pretrained(tmp_path / "patch", **(save or {}))
        return peft_model, Patch.open(tmp_path / "patch")

    return make


def entries(patch: Patch) -> Counter[str]:
    pairs = [*patch.modules.values(), *(pair for stack in patch.stacks.values() for pair in stack)]
    held = [entry for p in pairs for entry in (p.a_entry, p.b_entry, p.magnitude, p.bias) if entry is not None]
    held += [rows.entry for rows in patch.tokens.values()]
    held += [*patch.replaced.values(), *patch.saved.values(), *patch.idle.values()]
    return Counter(entry.name for entry in held)


def delta(pair: LoraPair) -> torch.Tensor:
    return pair.scaling * pair.b @ pair.a


def layers(peft_model: Any) -> dict[str, Any]:
    """peft's LoRA layers by the module's name, the outermost of nested ones."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and not name.endswith(".base_layer"):
            found[name] = module
    return found


def assert_same(peft_model: Any, patch: Patch) -> None:
    """Every LoRA layer of peft is in the patch with the same update, magnitude and bias, and the file holds no more."""
    found = layers(peft_model)
    assert set(found) == set(patch.modules) | set(patch.stacks)
    assert entries(patch) == Counter(patch.header.tensors.keys())
    for name, pair in patch.modules.items():
        layer = found[name]
        expected = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(delta(pair).T if getattr(layer, "fan_in_fan_out", False) else delta(pair), expected)
        if pair.magnitude is not None:
            magnitude = layer.lora_magnitude_vector["default"].weight.detach()
            assert torch.equal(pair.magnitude_values, magnitude.reshape(-1))
        if pair.bias is not None:
            assert torch.equal(pair.bias_values, layer.lora_B["default"].bias.detach())
    for name, stack in patch.stacks.items():
        assert_stack(found[name], patch, name, stack)


def assert_stack(layer: Any, patch: Patch, owner: str, stack: tuple[LoraPair, ...]) -> None:
    module = layer.get_base_layer()
    named = stack_pairs(patch.config, owner, [name for name, _ in module.named_parameters(recurse=False)], stack)
    for name, pair in named:
        assert name == layer.parameter_name
        expected = layer.get_delta_weight("default").detach()
        turned = expected.ndim == 3 and getattr(module, "is_transposed", False)
        if expected.ndim == 2:
            torch.testing.assert_close(delta(pair), expected)
        for expert in range(expected.shape[0] if expected.ndim == 3 else 0):
            a, b = factors(pair, expected.shape[0], expert)
            update = pair.scaling * b @ a
            torch.testing.assert_close(update.T if turned else update, expected[expert])
        layer = layer.base_layer
    assert layer is module, "peft has a wrapper more"


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
QV = ["q_proj", "v_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": QV}),
    "linear, all of them": ("llama", {"target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {"target_modules": QV, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": QV,
            "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 3, "v_proj": 1},
            "alpha_pattern": {"layers.[01].self_attn.(q|v)_proj": 5},
        },
    ),
    "layers": ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "a layer": ("llama", {"target_modules": QV, "layers_to_transform": 0}),
    "excluded": ("llama", {"target_modules": r".*(q|v)_proj", "exclude_modules": r".*layers\.0.*"}),
    "excluded by name": ("llama", {"target_modules": QV, "exclude_modules": [Q]}),
    "DoRA": ("llama", {"target_modules": QV, "use_dora": True, "use_rslora": True}),
    "DoRA on Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "DoRA on the embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D without the flag": ("gpt2", {"target_modules": ["c_attn"]}),
    "biases of B": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embeddings": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "positions": ("gpt2", {"target_modules": ["wpe", "wte"]}),
    "EVA": ("llama", {"target_modules": QV, "init_lora_weights": "eva"}),
    "MiCA": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}),
    "orthogonal": ("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "PiSSA": ("llama", {"target_modules": QV, "init_lora_weights": "pissa"}),
    "OLoRA": ("llama", {"target_modules": QV, "init_lora_weights": "olora"}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one parameter of the experts": ("mixtral", {"target_modules": [], "target_parameters": ["gate_up_proj"]}),
    "experts in and out swapped": ("gpt_oss", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts and their biases": (
        "gpt_oss",
        {"target_modules": [], "target_parameters": [*EXPERTS, "experts.gate_up_proj_bias", "down_proj_bias"]},
    ),
    "square experts": ("square", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts of several ranks": (
        "mixtral",
        {
            "target_modules": ["k_proj"],
            "target_parameters": [*EXPERTS, "mlp.gate.weight"],
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {".*gate_up_proj": 7},
        },
    ),
    "experts by their old names": ("mixtral", {"target_modules": ["w1", "w2", "w3", "gate", "q_proj"]}),
    "experts of all-linear": ("mixtral", {"target_modules": "all-linear"}),
    "matrices as parameters": (
        "llama", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "embed_tokens.weight"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_pefts_own(name: str, adapt: Adapt) -> None:
    model, config = UPDATES[name]
    peft_model, patch = adapt(build(model), **config)
    assert_same(peft_model, patch)
    assert all(math.isnan(pair.scaling) for stack in patch.stacks.values() for pair in stack), "stack_pairs decides"
    assert patch.init == {"PiSSA": "pissa", "OLoRA": "olora"}.get(name, "plain")


def test_the_last_parameter_is_wrapped_outermost(adapt: Adapt) -> None:
    _, patch = adapt(build("mixtral"), target_modules=[], target_parameters=EXPERTS)
    owner = "model.layers.0.mlp.experts"
    order = ["gate_up_proj", "down_proj"]
    names = [name for name, _ in stack_pairs(patch.config, owner, order, patch.stacks[owner])]
    assert names == ["down_proj", "gate_up_proj"]
    with pytest.raises(UnmatchedModulesError, match=r"holds 2 updates, target_parameters names 1 .*\(down_proj\)"):
        stack_pairs(patch.config, owner, ["down_proj"], patch.stacks[owner])


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.19.1.dev0@abc", "0.20.0", "0.19.1"])
def test_square_experts_need_a_version_that_tells_their_layout(version: str | None, adapt: Adapt) -> None:
    _, patch = adapt(build("square"), target_modules=[], target_parameters=["gate_up_proj"])
    owner = "model.layers.0.mlp.experts"
    config = {**patch.config, "peft_version": version}
    if version in ("0.20.0", "0.19.1"):
        assert stack_pairs(config, owner, ["gate_up_proj", "down_proj"], patch.stacks[owner])
        return
    with pytest.raises(UnsupportedPatchError, match="8×8 does not tell"):
        stack_pairs(config, owner, ["gate_up_proj", "down_proj"], patch.stacks[owner])


def whole(peft_model: Any) -> dict[str, torch.Tensor]:
    """The parameters of modules that peft saves whole, by their names without its wrappers."""
    marks = (".modules_to_save.default", ".base_layer")
    found = {}
    for name, parameter in peft_model.get_base_model().named_parameters(remove_duplicate=False):
        if marks[0] in name or (name.endswith(".bias") and ".original_module" not in name and ".lora_" not in name):
            found[name.replace(marks[0], "").replace(marks[1], "")] = parameter.detach()
    return found


EMBEDDINGS = ["embed_tokens", "lm_head"]
BOTH = {"save_embedding_layers": True}
WHOLE: dict[str, tuple[str, dict[str, Any], set[str], set[str]]] = {  # model, config, saved, idle
    "head": ("llama", {"modules_to_save": ["lm_head"]}, set(), set()),
    "embeddings and norms": ("llama", {"modules_to_save": [*EMBEDDINGS, "norm"]}, set(), set()),
    "tied embeddings": ("tied", {"modules_to_save": EMBEDDINGS}, set(), set()),
    "a tied head alone": ("tied", {"modules_to_save": ["lm_head"]}, set(), set()),
    "a whole block": ("llama", {"modules_to_save": ["layers.1.mlp"]}, set(), set()),
    "classifier": ("classifier", {"task_type": "SEQ_CLS"}, set(), set()),
    "grown, as peft saves it": (
        "llama", {"modules_to_save": ["embed_tokens"], "save": BOTH}, {"lm_head"},
        {"model.embed_tokens.original_module.weight", "model.embed_tokens.modules_to_save.weight"},
    ),
    "copies of the embeddings": ("llama", {"save": BOTH}, {"model.embed_tokens", "lm_head"}, set()),
    "all biases": ("biased", {"bias": "all"}, set(), set()),
    "biases beside LoRA": ("biased", {"bias": "lora_only"}, set(), set()),
    "biases and a module": (
        "biased", {"bias": "all", "modules_to_save": ["o_proj"]}, set(),
        {
            f"model.layers.{i}.self_attn.o_proj.{part}.bias"
            for i in (0, 1) for part in ("original_module", "modules_to_save")
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_peft_saves_whole_is_replaced(name: str, adapt: Adapt) -> None:
    model, config, saved, idle = WHOLE[name]
    base = build("llama", attention_bias=True) if model == "biased" else build(model)
    peft_model, patch = adapt(base, target_modules=["q_proj"], **config)
    assert_same(peft_model, patch)
    expected = whole(peft_model) if config.get("bias") != "lora_only" else {}
    expected |= {
        k: v for k, v in whole(peft_model).items() if config.get("bias") == "lora_only" and ".q_proj.bias" in k
    }
    assert {name: entry.read().tolist() for name, entry in patch.replaced.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    assert set(patch.saved) == saved
    assert set(patch.idle) == idle
    for module, entry in patch.saved.items():
        assert torch.equal(entry.read(), base.get_submodule(module).weight)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ".*(lm_head|q_proj)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "save": BOTH},
    ],
    ids=str,
)
def test_tied_sides_are_both_there(config: dict[str, Any], adapt: Adapt) -> None:
    peft_model, patch = adapt(build("tied"), ensure_weight_tying=True, **config)
    assert_same(peft_model, patch)
    assert patch.ensure_weight_tying
    if "modules_to_save" in config:
        one, other = (patch.replaced[f"{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
        assert torch.equal(one.read(), other.read())
    else:
        assert torch.equal(delta(patch.modules["model.embed_tokens"]), delta(patch.modules["lm_head"]))
    named = isinstance(config["target_modules"], str)  # the pattern names the head itself
    assert patch.follows_tie == (frozenset() if named else {"lm_head"})


TOKENS: dict[str, tuple[str, Any, dict[str, tuple[int, ...]]]] = {
    "list": ("llama", [4, 1], {"model.embed_tokens": (4, 1)}),
    "list, tied": ("tied", [1, 4], {"model.embed_tokens": (1, 4)}),
    "each side": (
        "llama", {"embed_tokens": [1, 4], "lm_head": [2]}, {"model.embed_tokens": (1, 4), "lm_head": (2,)},
    ),
    "each side, tied": (
        "tied", {"embed_tokens": [1, 4], "lm_head": [2]}, {"model.embed_tokens": (1, 4), "lm_head": (2,)},
    ),
    "the same on both sides, tied": (
        "tied", {"embed_tokens": [1, 4], "lm_head": [1, 4]}, {"model.embed_tokens": (1, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("save", [None, BOTH])
@pytest.mark.parametrize("name", TOKENS)
def test_trained_tokens_are_rows(name: str, save: Any, adapt: Adapt) -> None:
    model, indices, expected = TOKENS[name]
    peft_model, patch = adapt(build(model), target_modules=["q_proj"], trainable_token_indices=indices, save=save)
    assert_same(peft_model, patch)
    copied = save is not None and "tied" in name
    if copied and isinstance(indices, dict):
        expected = {"lm_head": tuple(indices["lm_head"]), **expected}  # peft then saves the tied side again
    assert {module: rows.indices for module, rows in patch.tokens.items()} == expected
    shared = "tied" in name and not copied and isinstance(indices, dict) and "lm_head" not in expected
    assert patch.follows_tie == ({"lm_head"} if shared else frozenset())
    again = {"lm_head.token_adapter.trainable_tokens_delta"}
    assert set(patch.idle) == (again if copied and isinstance(indices, list) else set())
    for module, rows in patch.tokens.items():
        adapter = peft_model.get_base_model().get_submodule(module).token_adapter
        assert torch.equal(rows.values, adapter.trainable_tokens_delta["default"])
        merged = adapter.get_merged_weights(["default"])
        assert torch.equal(merged[list(rows.indices)], rows.values)
    assert set(patch.saved) == (set() if save is None else {"model.embed_tokens", "lm_head"})


def test_saving_embeddings_beside_a_tuned_head(adapt: Adapt) -> None:
    peft_model, patch = adapt(build("llama"), target_modules=["lm_head"])
    assert set(patch.saved) == {"lm_head"}  # peft does so by itself
    assert_same(peft_model, patch)


def test_a_converted_start_is_plain(adapt: Adapt, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=QV, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    patch = Patch.open(tmp_path / "plain")
    assert patch.init == "plain"
    assert patch.modules[Q].rank == 4
    torch.testing.assert_close(delta(patch.modules[Q]), torch.zeros(8, 8), atol=1e-5, rtol=0)


EDITS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.(q|v)_proj|.*embed_tokens"},
    {"target_modules": "v_proj"},
    {"target_modules": [Q, "layers.1.self_attn.q_proj", "v_proj", "model.embed_tokens"]},
    {"exclude_modules": ["v_proj"]},
    {"exclude_modules": r"model\.layers\.0\..*"},
    {"exclude_modules": ["proj"]},
    {"layers_to_transform": [1]},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers", "target_modules": [*QV, "model.embed_tokens"]},
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_what_peft_would_pass_over_is_an_error(edit: dict[str, Any], adapt: Adapt, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    adapt(build("llama"), target_modules=[*QV, "embed_tokens"], save={"save_embedding_layers": False})
    path = tmp_path / "patch" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    try:
        loaded = PeftModel(build("llama"), LoraConfig.from_pretrained(str(path.parent)))
        passed_over = set_peft_model_state_dict(
            loaded, load_file(path.parent / "adapter_model.safetensors")
        ).unexpected_keys
    except ValueError as error:
        assert "not found in the base model" in str(error)  # noqa: PT017 - peft passes over everything
        passed_over = ["everything"]
    if not passed_over:
        Patch.open(path.parent)
        return
    with pytest.raises(UnmatchedModulesError, match="gives .* no LoRA"):
        Patch.open(path.parent)
