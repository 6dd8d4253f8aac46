"""A layout is right when the parts it names, put together, are the model transformers loads, element by element."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import Layout
from portllm.errors import CheckpointError
from portllm.lm.names.layout import built

TEXT: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
HEADED: dict[str, Any] = {**TEXT, "head_dim": 4}
MOE: dict[str, Any] = {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT: dict[str, Any] = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 4,
    "image_size": 8,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}

# class, settings of its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", TEXT),
    "llama tied": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "llama classifier": ("LlamaForSequenceClassification", {**TEXT, "num_labels": 3}),
    "llama bare": ("LlamaModel", TEXT),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "gpt_neox tied": ("GPTNeoXForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", {**TEXT, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 1}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "head_dim": 4, "decoder_sparse_step": 1}),
    "olmoe": ("OlmoeForCausalLM", {**TEXT, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**TEXT, **LATENT}),
    "granitemoe": ("GraniteMoeForCausalLM", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssForCausalLM", {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": ("Llama4ForCausalLM", {**HEADED, "intermediate_size_mlp": 20, "num_local_experts": 4}),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "gemma2": ("Gemma2ForCausalLM", HEADED),
    "gemma3": ("Gemma3ForCausalLM", HEADED),
}  # fmt: skip


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Checkpoint]:
    """save(class name, settings, shards="4KB"): a seeded model of that class, saved by transformers."""
    import transformers

    def make(name: str, settings: Mapping[str, Any], shards: str = "4KB") -> Checkpoint:
        model_class = getattr(transformers, name)
        config = model_class.config_class(**settings)
        torch.manual_seed(7)
        model = model_class(config).to(torch.float32)
        for parameter in model.parameters():  # norms and biases are all ones and zeros: make each element its own
            torch.nn.init.normal_(parameter)
        folder = tmp_path / "base"
        model.save_pretrained(folder, max_shard_size=shards)
        return Checkpoint.open(folder)

    return make


def loaded(base: Checkpoint, name: str = "") -> dict[str, torch.Tensor]:
    """What transformers loads: each parameter and stored buffer by its name."""
    import transformers

    model_class = getattr(transformers, name or base.config["architectures"][0])
    model = model_class.from_pretrained(base.path, dtype=torch.float32)
    return dict(model.state_dict(keep_vars=True))


def assembled(base: Checkpoint, layout: Layout, parameter: str, shape: torch.Size) -> torch.Tensor:
    """A parameter put together from its parts; NaN where nothing is, and an error where two parts meet."""
    value = torch.full(shape, torch.nan)
    for part in layout.blocks[parameter]:
        at = tuple(i if isinstance(i, int) else slice(*i) for i in part.at)
        block = base.entry(part.tensor).read()[tuple(slice(*span) for span in part.of)].to(torch.float32)
        block = block.mT if part.transposed else block
        assert value[at].shape == block.shape
        assert value[at].isnan().all(), f"{parameter}: two parts at {part.at}"
        value[at] = block
    return value


def assert_right(base: Checkpoint, layout: Layout, memory: Mapping[str, torch.Tensor]) -> None:
    """Every parameter in memory is what its parts, or those of the one it is tied to, make."""
    assert not layout.opaque
    for name, value in memory.items():
        kept = layout.tied.get(name, name)
        assert torch.equal(assembled(base, layout, kept, value.shape), value.detach()), name
    held = [(f"{name}.{key}", shape) for name, m in layout.modules.items() for key, shape in m.parameters.items()]
    assert {name.lstrip("."): shape for name, shape in held} == {name: value.shape for name, value in memory.items()}
    assert layout.blocks.keys() <= memory.keys()
    assert_ties(layout, memory)


def assert_ties(layout: Layout, memory: Mapping[str, torch.Tensor]) -> None:
    """Two names are tied exactly when they are one parameter in memory."""
    for one, other in itertools.combinations(memory, 2):
        tied = layout.tied.get(one, one) == layout.tied.get(other, other)
        assert tied == (memory[one] is memory[other]), (one, other)


@pytest.mark.parametrize("model", MODELS)
def test_parts_make_the_model_that_transformers_loads(model: str, save: Callable[..., Checkpoint]) -> None:
    base = save(*MODELS[model])
    layout = built(base)
    assert layout.architecture == MODELS[model][0]
    assert len(base.shards) > 3
    assert_right(base, layout, loaded(base))


def rewrite(
    base: Checkpoint, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **config: Any
) -> Checkpoint:
    """The same checkpoint in one file with other tensors, and other settings; None takes a setting away."""
    tensors = change({name: base.entry(name).read() for name in base.names})
    for path in base.path.glob("model*"):
        path.unlink()
    save_file(tensors, base.path / "model.safetensors", metadata={"format": "pt"})
    settings = {key: value for key, value in {**base.config, **config}.items() if value is not None}
    (base.path / "config.json").write_text(json.dumps(settings))
    return Checkpoint.open(base.path)


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Every name that begins with `old` begins with `new`."""
    return lambda tensors: {new + k[len(old) :] if k.startswith(old) else k: v for k, v in tensors.items()}


def test_gpt2_as_the_hub_has_it(save: Callable[..., Checkpoint]) -> None:
    extra = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    base = rewrite(save(*MODELS["gpt2"]), lambda t: renamed("transformer.", "")(t) | extra)
    layout = built(base)
    assert layout.blocks["transformer.wte.weight"][0].tensor == "wte.weight"
    assert layout.modules["transformer.h.0.attn.c_attn"].kind == "conv1d"
    assert not {part.tensor for parts in layout.blocks.values() for part in parts} & extra.keys()
    assert_right(base, layout, loaded(base))


def test_tensors_that_the_model_does_not_load_are_not_in_the_layout(save: Callable[..., Checkpoint]) -> None:
    extra = {
        "model.layers.2.mtp.weight": torch.ones(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    base = rewrite(save(*MODELS["llama"]), lambda t: t | extra)
    layout = built(base)
    assert {part.tensor for parts in layout.blocks.values() for part in parts} == set(base.names) - extra.keys()


@pytest.mark.parametrize("old", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("model", ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_a_vision_language_model(model: str, old: str, save: Callable[..., Checkpoint]) -> None:
    text = {"model_type": "gemma3_text" if model.startswith("Gemma3") else "llama", **HEADED}
    vision = {"model_type": "siglip_vision_model" if model.startswith("Gemma3") else "clip_vision_model", **VISION}
    more = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    base = save(model, {"text_config": text, "vision_config": vision, **more})
    mine = next(n for n in base.names if n.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    base = rewrite(base, renamed(mine, old))
    layout = built(base)
    assert (
        layout.blocks["model.language_model.layers.0.mlp.up_proj.weight"][0].tensor
        == f"{old}layers.0.mlp.up_proj.weight"
    )
    assert_right(base, layout, loaded(base))


@pytest.mark.parametrize("model", ["llama", "gpt_neox", "t5"])
@pytest.mark.parametrize("stored", ["head only", "both, equal", "both, different"])
def test_a_config_that_ties_stored_weights(model: str, stored: str, save: Callable[..., Checkpoint]) -> None:
    """Which of the tied ones is on disk, and whether two of them are one, is settled as transformers settles it."""
    base = save(*MODELS[model])
    head = "embed_out.weight" if model == "gpt_neox" else "lm_head.weight"
    ends = ("embed_tokens.weight", "embed_in.weight", "shared.weight")
    embedding = next(name for name in base.names if name.endswith(ends))

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors.setdefault(head, torch.randn(32, 16))
        if stored == "head only":
            del tensors[embedding]
        elif stored == "both, equal":
            tensors[head] = tensors[embedding].clone()
        return tensors

    base = rewrite(base, change, tie_word_embeddings=True)
    layout = built(base)
    assert_right(base, layout, loaded(base))
    assert (layout.tied.get("lm_head.weight") is None) == (stored != "both, equal")


@pytest.mark.parametrize("model", ["llama tied", "gpt2", "gpt_neox tied", "t5", "gemma2"])
def test_an_absent_parameter_is_found_under_the_name_given(model: str, save: Callable[..., Checkpoint]) -> None:
    base = save(*MODELS[model])
    layout = built(base)
    assert layout.absent.keys() == layout.tied.keys()
    value = torch.randn(32, 16)
    base = rewrite(base, lambda t: t | {layout.absent["lm_head.weight"]: value}, tie_word_embeddings=False)
    assert torch.equal(loaded(base)["lm_head.weight"], value)
    assert layout.absent["lm_head.weight"] == {"gpt_neox tied": "embed_out.weight"}.get(model, "lm_head.weight")


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2_moe"])
def test_a_classifier_on_a_language_model(model: str, save: Callable[..., Checkpoint]) -> None:
    base = save(*MODELS[model])
    layout = built(base, "SEQ_CLS", num_labels=3)
    head = "LMHeadModel" if model == "gpt2" else "ForCausalLM"
    assert layout.architecture == MODELS[model][0].replace(head, "ForSequenceClassification")
    memory = loaded(base, layout.architecture)
    assert layout.modules["score"].parameters == {"weight": (3, memory.pop("score.weight").shape[1])}
    assert layout.absent == {"score.weight": "score.weight"}
    for name, value in memory.items():
        assert torch.equal(assembled(base, layout, name, value.shape), value.detach())


@pytest.mark.parametrize("names", [None, ["LLaMAForCausalLM"], ["MixtralForCausalLM"]])
def test_a_config_whose_class_is_not_in_transformers(names: list[str] | None, save: Callable[..., Checkpoint]) -> None:
    base = rewrite(save(*MODELS["llama"]), lambda t: t, architectures=names)
    layout = built(base)
    assert layout.architecture == "LlamaForCausalLM"
    assert_right(base, layout, loaded(base, "LlamaForCausalLM"))


def test_a_classifier_keeps_its_own_head(save: Callable[..., Checkpoint]) -> None:
    base = save(*MODELS["llama classifier"])
    assert built(base, "SEQ_CLS", num_labels=3) == built(base)


def test_a_causal_patch_on_a_bare_model_has_the_language_models_layout(save: Callable[..., Checkpoint]) -> None:
    base = save(*MODELS["llama bare"])
    layout = built(base, "CAUSAL_LM")
    assert layout.blocks["model.norm.weight"][0].tensor == "norm.weight"
    assert layout.absent == {"lm_head.weight": "lm_head.weight"}


def test_experts_stored_fused_already(save: Callable[..., Checkpoint]) -> None:
    base = save(*MODELS["mixtral"])
    memory = {name: value.detach().clone() for name, value in loaded(base).items()}
    base = rewrite(base, lambda _: memory)
    layout = built(base)
    assert layout.blocks["model.layers.0.mlp.experts.down_proj"][0].of == ((0, 4), (0, 16), (0, 24))
    assert_right(base, layout, loaded(base))


@pytest.fixture
def odd_rules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """odd_rules(rule, …): what transformers does to a Llama on loading, for this test."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")

    def put(*rules: Any) -> None:
        monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", list(rules))

    return put


def test_an_operation_not_followed_leaves_its_parameters_out_by_name(
    save: Callable[..., Checkpoint], odd_rules: Callable[..., None]
) -> None:
    from transformers.core_model_loading import Chunk, Interleave, WeightConverter

    base = save(*MODELS["llama"])
    whole = built(base)
    odd_rules(
        WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", [Interleave(dim=1)]),
        WeightConverter(
            "mlp.down_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Interleave(dim=0), Chunk(dim=0)]
        ),
    )
    base = rewrite(base, lambda t: {k: v for k, v in t.items() if "gate_proj" not in k and "up_proj" not in k})
    layout = built(base)
    one, two = "through Interleave", "through Interleave and Chunk"
    reasons = {"self_attn.o_proj": one, "mlp.gate_proj": two, "mlp.up_proj": two}
    assert layout.opaque == {f"model.layers.{i}.{k}.weight": v for i in range(2) for k, v in reasons.items()}
    gone = {*layout.opaque, "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    assert layout.blocks == {name: parts for name, parts in whole.blocks.items() if name not in gone}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "code of its own": ({"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}, "runs no code from a checkpoint"),
    "unknown type": ({"model_type": "mine"}, "a model_type that transformers contains, found 'mine'"),
    "no type": ({"model_type": None}, "found None"),
    "other width": ({"intermediate_size": 28}, r"down_proj.weight is 16×28 by config.json, 16×24 in the files"),
    "grown vocabulary": ({"vocab_size": 33}, "33×16 by config.json, 32×16 in the files"),
    "endless": ({"num_hidden_layers": 10**9}, "num_hidden_layers of at most 1000, found 1000000000"),
    "endless labels": ({"num_labels": 10**9}, "num_labels of at most 30000"),
    "nonsense": ({"num_attention_heads": 0}, "fetch the file again"),
    "wrong kind": ({"hidden_size": "many"}, "builds a llama config from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_does_not_fit_is_refused(case: str, save: Callable[..., Checkpoint]) -> None:
    settings, text = REFUSED[case]
    base = rewrite(save(*MODELS["llama"]), lambda t: t, **settings)
    with pytest.raises(CheckpointError, match=text) as caught:
        built(base)
    assert "\n" not in str(caught.value)
    assert str(base.path) in str(caught.value)


def test_too_many_parameters_are_refused(save: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portllm.lm.names.building.MAX_PARAMETERS", 9)
    with pytest.raises(CheckpointError, match="more than 9 parameters"):
        built(save(*MODELS["llama"]))


def test_no_class_for_the_task_is_refused(save: Callable[..., Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match="a model_type with a SEQ_CLS class in transformers, found 'granitemoe'"):
        built(save(*MODELS["granitemoe"]), "SEQ_CLS", num_labels=2)


def test_experts_both_fused_and_separate_are_left_out(save: Callable[..., Checkpoint]) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    base = rewrite(save(*MODELS["mixtral"]), lambda t: t | {name: torch.zeros(4, 16, 24)})
    layout = built(base)
    assert layout.opaque == {name: "both fused and in pieces"}
    assert name not in layout.blocks


def test_a_missing_expert_is_an_error(save: Callable[..., Checkpoint]) -> None:
    gone = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    base = rewrite(save(*MODELS["mixtral"]), lambda t: {k: v for k, v in t.items() if k != gone})
    with pytest.raises(CheckpointError, match=r"experts.down_proj is 4×16×24 by config.json, 3×16×24 in the files"):
        built(base)


@pytest.mark.parametrize("operation", ["Chunk", "Split"])
def test_one_tensor_on_disk_that_is_several_parameters(
    operation: str, save: Callable[..., Checkpoint], odd_rules: Callable[..., None]
) -> None:
    from transformers import core_model_loading as rules

    many = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    if operation == "Chunk":
        many = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    fused = rules.WeightConverter("fused.weight", list(many), [getattr(rules, operation)(dim=0)])

    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for i in range(2):
            blocks = [tensors.pop(f"model.layers.{i}.{name}") for name in many]
            tensors[f"model.layers.{i}.fused.weight"] = torch.cat(blocks)
        return tensors

    base = rewrite(save(*MODELS["llama"]), fuse)
    odd_rules(fused)
    layout = built(base)
    last = layout.blocks[f"model.layers.1.{many[-1]}"]
    assert [part.tensor for part in last] == ["model.layers.1.fused.weight"]
    assert_right(base, layout, loaded(base))


def test_fused_experts_transposed_on_disk(save: Callable[..., Checkpoint]) -> None:
    """As Qwen3-VL-MoE is on the hub: (experts, in, out) where the model has (experts, out, in)."""
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "out_hidden_size": 16}
    vision |= {"deepstack_visual_indexes": [0], "patch_size": 4, "num_position_embeddings": 16}
    text = {**MOE, "head_dim": 4, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
    base = save("Qwen3VLMoeForConditionalGeneration", {"text_config": text, "vision_config": vision})
    turned = {name for name in base.names if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert len(turned) == 4
    base = rewrite(base, lambda t: {k: v.mT.contiguous() if k in turned else v for k, v in t.items()})
    layout = built(base)
    assert all(part.transposed for name in turned for part in layout.blocks[name])
    assert_right(base, layout, loaded(base))


def test_the_text_class_of_a_vision_language_model(save: Callable[..., Checkpoint]) -> None:
    vision = {"model_type": "siglip_vision_model", **VISION}
    base = save("Gemma3ForConditionalGeneration", {"text_config": HEADED, "vision_config": vision})
    text = next(name for name in base.names if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    keep = renamed(text, "model.")
    base = rewrite(
        base,
        lambda t: keep({k: v for k, v in t.items() if k.startswith(text)}),
        architectures=["Gemma3ForCausalLM"],
    )
    layout = built(base)
    assert layout.architecture == "Gemma3ForCausalLM"
    assert_right(base, layout, loaded(base, "Gemma3ForCausalLM"))
