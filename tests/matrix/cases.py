"""The matrix: every configuration of PEFT that the port supports, on every architecture where it means something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.matrix.architectures import ARCHITECTURES, EXPERTS
from tests.matrix.judge import Case

UNTIED = {"tie_word_embeddings": False}
QUERY_VALUE = {"target_modules": ["q_proj", "v_proj"]}


def _linears(name: str) -> dict[str, Any]:
    return {"target_modules": list(ARCHITECTURES[name].linears)}


def _every_architecture() -> Iterator[Case]:
    for name, arch in ARCHITECTURES.items():
        yield Case(name, "query_value", {"target_modules": list(arch.query_value)})
        yield Case(name, "linears", _linears(name))
        yield Case(name, "dora", {**_linears(name), "use_dora": True})
        if arch.experts:
            yield Case(name, "experts", {"target_modules": [], "target_parameters": list(arch.experts)})
            yield Case(
                name, "attention+experts+router",
                {**_linears(name), "target_parameters": [*arch.experts, str(arch.router)]},
            )  # fmt: skip


def _patterns() -> Iterator[Case]:
    """Scaling, rank and choice of modules: plain LoRA with everything that may be said about it."""
    for name in ("llama", "gpt2"):
        yield Case(name, "rslora", {**_linears(name), "use_rslora": True})
        yield Case(name, "dora+rslora", {**_linears(name), "use_rslora": True, "use_dora": True})
        yield Case(name, "layers_to_transform", {**_linears(name), "layers_to_transform": [1]})
    yield Case(
        "llama", "patterns",
        {
            **_linears("llama"), "alpha_pattern": {"^model.layers.0.*proj": 3},
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "^model.layers.0.*gate": 3},
        },
    )  # fmt: skip
    yield Case(
        "llama", "patterns+rslora+dora",
        {
            **_linears("llama"), "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"self_attn.v_proj": 1},
            "use_rslora": True, "use_dora": True,
        },
    )  # fmt: skip
    yield Case("gpt2", "patterns", {**_linears("gpt2"), "rank_pattern": {"^transformer.h.1.mlp.c_proj": 2}})
    yield Case("mixtral", "exclude", {**_linears("mixtral"), "exclude_modules": ["o_proj"]})
    yield Case("llama", "exclude", {**_linears("llama"), "exclude_modules": r".*\.1\.mlp\..*"})
    yield Case("llama", "regex", {"target_modules": r"model\.layers\.\d\.(self_attn|mlp)\.(q|up)_proj"})
    yield Case("llama", "all-linear", {"target_modules": "all-linear"})
    yield Case("qwen3", "all-linear", {"target_modules": "all-linear", "use_rslora": True})
    yield Case("t5", "all-linear", {"target_modules": "all-linear"})
    for name in ("gpt2", "gpt2-hub"):  # the layout is the base's, whatever the flag says
        yield Case(name, "fan_in_fan_out", {**_linears(name), "fan_in_fan_out": True})
        yield Case(name, "fan_in_fan_out-unsaid", _linears(name), edit={"fan_in_fan_out": False})
    yield Case("llama", "fan_in_fan_out", {**_linears("llama"), "fan_in_fan_out": True})
    yield Case("gpt2", "dora-fan_in_fan_out-unsaid", {**_linears("gpt2"), "use_dora": True},
               edit={"fan_in_fan_out": False})  # fmt: skip


def _initialisations() -> Iterator[Case]:
    for name, init in (("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")):  # PEFT has no OLoRA for Conv1D
        lora = {**_linears(name), "init_lora_weights": init}
        yield Case(name, init, lora, source=True, residual=True)
        yield Case(name, f"{init}-alone", lora, refused="--from", residual=True)
    yield Case("gpt2-hub", "pissa", {**_linears("gpt2"), "init_lora_weights": "pissa"}, source=True, residual=True)
    yield Case("llama", "pissa+rslora", {**_linears("llama"), "init_lora_weights": "pissa", "use_rslora": True,
               "rank_pattern": {"v_proj": 3}}, source=True, residual=True)  # fmt: skip
    yield Case("llama", "pissa_niter", {**_linears("llama"), "init_lora_weights": "pissa_niter_4"},
               source=True, residual=True, refused="pissa_niter_4")  # fmt: skip
    for name in ("llama", "gpt2"):  # EVA chooses where A starts, and leaves the base alone
        eva = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99, "use_label_mask": True}}
        yield Case(name, "eva", {**_linears(name), "rank_pattern": {"mlp.up_proj": 2, "mlp.c_proj": 3}}, edit=eva)
    yield Case("llama", "gaussian", {**QUERY_VALUE, "init_lora_weights": "gaussian"})
    yield Case("llama", "orthogonal", {**QUERY_VALUE, "init_lora_weights": "orthogonal"})
    yield Case("llama", "mica", {**_linears("llama"), "init_lora_weights": "mica"})
    for init in ("corda", "loftq", "lora_ga", "someday"):
        yield Case("llama", init, QUERY_VALUE, edit={"init_lora_weights": init}, refused=init)


def _embeddings_and_heads() -> Iterator[Case]:
    for name, arch in ARCHITECTURES.items():
        if name == "t5":
            continue
        e, h, first = arch.embedding, arch.head, arch.query_value[0]
        change = UNTIED if arch.tied else {}
        yield Case(name, "embedding", {"target_modules": [first, e]}, config=change)
        if name in ("llama", "gpt_neox", "llama-tied", "gemma2", "gpt2", "gpt2-hub", "llava"):
            yield Case(name, "head", {"target_modules": [first, h]}, config=change)
            yield Case(name, "embedding+head", {"target_modules": [first, e, h]}, config=change)
        if name in ("llama", "llama-tied", "gpt2"):
            yield Case(name, "embedding+head-dora", {"target_modules": [e, h], "use_dora": True}, config=change)
            yield Case(name, "embedding-copies", {"target_modules": [first, e]}, copies=True, source=True,
                       config=change)  # fmt: skip
            yield Case(name, "head-copies", {"target_modules": [first, h]}, copies=True, source=True, config=change)
    yield Case("gpt2", "positions", {"target_modules": ["c_attn", "wpe"]})
    yield Case("llama", "head-copies-unproven", {"target_modules": ["q_proj", "lm_head"]}, copies=True,
               refused="--from")  # fmt: skip
    for name in ("llama-tied", "gemma2"):
        for what, targets in (("embedding", ["embed_tokens"]), ("head", ["lm_head"]),
                              ("embedding+head", ["embed_tokens", "lm_head"])):  # fmt: skip
            yield Case(name, f"{what}-tying", {"target_modules": ["q_proj", *targets], "ensure_weight_tying": True})
    # PEFT ties what is called embed_tokens or lm_head, and on loading has no record that the head was a target
    tying = {"ensure_weight_tying": True}
    yield Case("gpt2", "embedding-tying", {"target_modules": ["c_attn", "wte"], **tying}, config=UNTIED)
    yield Case("gpt2", "head-tying", {"target_modules": ["c_attn", "lm_head"], **tying}, refused="lm_head.*both sides")
    yield Case("gpt2", "embedding+head-tying", {"target_modules": ["c_attn", "wte", "lm_head"], **tying},
               refused="lm_head.*both sides")  # fmt: skip
    for module, refused in (("lm_head", None), ("embed_tokens", "lm_head.*copy")):  # untied, next to the other's copy
        yield Case("llama", f"save-{module}-tying-copies", {"target_modules": ["q_proj"], "modules_to_save": [module],
                   "ensure_weight_tying": True}, copies=True, source=True, refused=refused)  # fmt: skip
    yield Case("llama", "embedding-tying", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True})


def _whole_modules() -> Iterator[Case]:
    for name in ("llama", "llama-tied", "gpt2", "gpt2-hub", "gemma2", "gpt_neox", "qwen2_moe"):
        arch = ARCHITECTURES[name]
        e, h, lora = arch.embedding, arch.head, {"target_modules": [arch.query_value[0]]}
        change = UNTIED if arch.tied else {}
        yield Case(name, "save-head", {**lora, "modules_to_save": [h]}, config=change)
        yield Case(name, "save-embedding", {**lora, "modules_to_save": [e]}, config=change)
        yield Case(name, "save-both", {**lora, "modules_to_save": [e, h]}, config=change)
        yield Case(name, "save-norm", {**lora, "modules_to_save": [arch.norm]})
        if arch.tied:
            tying, ties = {**lora, "ensure_weight_tying": True}, e == "embed_tokens"  # by PEFT, on loading
            refused = None if ties else "lm_head.*both sides"
            yield Case(name, "save-embedding-tying", {**tying, "modules_to_save": [e]}, config={} if ties else UNTIED)
            yield Case(name, "save-both-tying", {**tying, "modules_to_save": [e, h]}, refused=refused)
            yield Case(name, "save-both-tying-grown", {**tying, "modules_to_save": [e, h]}, vocabulary=52,
                       config={"vocab_size": 52}, refused=refused)  # fmt: skip
        yield Case(name, "save-both-grown", {**lora, "modules_to_save": [e, h]}, vocabulary=52,
                   config={**change, "vocab_size": 52})  # fmt: skip
    for name in ("mixtral", "qwen2_moe"):  # the experts' stacks among them
        yield Case(name, "save-mlp", {**QUERY_VALUE, "modules_to_save": ["mlp"]})
    yield Case("llama", "save-mlp", {**QUERY_VALUE, "modules_to_save": ["mlp"]})
    yield Case("llama", "save-embedding-grown", {**QUERY_VALUE, "modules_to_save": ["embed_tokens"]}, vocabulary=52,
               refused="vocab|embed|lm_head|rows")  # fmt: skip
    yield Case("llava", "save-both-grown", {**QUERY_VALUE, "modules_to_save": ["embed_tokens", "lm_head"]},
               vocabulary=52, refused="vocabulary of 52.*text_config")  # fmt: skip
    yield Case("llama", "shrunk", {**QUERY_VALUE, "modules_to_save": ["embed_tokens", "lm_head"]}, vocabulary=44,
               refused="vocab|embed|lm_head|shrink|rows")  # fmt: skip


def _biases() -> Iterator[Case]:
    for name in ("qwen2", "gpt2", "gpt_neox", "gpt_oss"):
        arch = ARCHITECTURES[name]
        yield Case(name, "bias-all", {**_linears(name), "bias": "all"})
        yield Case(name, "bias-lora_only", {"target_modules": list(arch.query_value), "bias": "lora_only"})
        biased = ["q_proj", "v_proj"] if name in ("qwen2", "gpt_oss") else list(arch.linears)
        yield Case(name, "lora_bias", {"target_modules": biased, "lora_bias": True})
    yield Case("llama", "bias-all", {**QUERY_VALUE, "bias": "all"})  # it has none
    yield Case("llama", "lora_bias", {**QUERY_VALUE, "lora_bias": True}, refused="(?i)bias")
    yield Case("qwen2", "lora_bias-one-missing", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
               refused="(?i)o_proj.*bias|bias.*o_proj")  # fmt: skip


def _tokens() -> Iterator[Case]:
    tokens = [3, 5, 40]
    for name in ("llama", "llama-tied", "gemma2", "gpt2", "gpt_neox", "gpt2-hub", "qwen3_moe"):
        arch = ARCHITECTURES[name]
        lora = {"target_modules": [arch.query_value[0]]}
        listed = {arch.embedding: tokens} if arch.embedding == "embed_in" else tokens
        yield Case(name, "tokens", {**lora, "trainable_token_indices": listed})
        yield Case(name, "tokens-dict", {**lora, "trainable_token_indices": {arch.embedding: [40, 3]}})
    for name in ("ctrl", "phi"):  # PEFT computes a head with trained tokens without its bias
        tokens_of = {ARCHITECTURES[name].embedding: tokens} if name == "ctrl" else {"lm_head": tokens}
        yield Case(name, "tokens", {**_linears(name), "trainable_token_indices": tokens_of}, refused="lm_head.*bias")
    for name in ("llama-tied", "gpt2-hub"):
        yield Case(name, "tokens+head", {"target_modules": ["lm_head"], "trainable_token_indices": tokens},
                   refused="lm_head.*tied to.*tokens are trained")  # fmt: skip
    yield Case("llama-tied", "tokens+save-head", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"],
               "trainable_token_indices": tokens}, refused="lm_head.token_adapter")  # fmt: skip
    yield Case("llama", "tokens-both",
               {**QUERY_VALUE, "trainable_token_indices": {"embed_tokens": tokens, "lm_head": [1, 47]}})  # fmt: skip
    yield Case("llama-tied", "tokens-both",
               {**QUERY_VALUE, "trainable_token_indices": {"embed_tokens": tokens, "lm_head": tokens}})  # fmt: skip
    yield Case("llama-tied", "tokens-apart",
               {**QUERY_VALUE, "trainable_token_indices": {"embed_tokens": tokens, "lm_head": [1, 47]}},
               config=UNTIED)  # fmt: skip
    yield Case("llama-tied", "tokens-tying",
               {**QUERY_VALUE, "trainable_token_indices": tokens, "ensure_weight_tying": True})  # fmt: skip


def _parameters() -> Iterator[Case]:
    yield Case("llama", "parameter", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]})
    yield Case("llama", "parameter-rslora",
               {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"], "use_rslora": True,
                "rank_pattern": {"0.mlp.down_proj.weight": 2}})  # fmt: skip
    for name, arch in ARCHITECTURES.items():
        if not arch.experts:
            continue
        if name in ("mixtral", "gpt_oss", "deepseek_v3", "llama4"):
            for parameter in EXPERTS:
                yield Case(name, parameter, {"target_modules": [], "target_parameters": [parameter]})
        yield Case(name, "router", {"target_modules": ["q_a_proj" if name == "deepseek_v3" else "q_proj"],
                   "target_parameters": [str(arch.router)]})  # fmt: skip
    yield Case("mixtral", "experts-rslora", {"target_modules": ["q_proj"], "target_parameters": list(EXPERTS),
               "use_rslora": True, "r": 2})  # fmt: skip


def _sequence_to_sequence() -> Iterator[Case]:
    yield Case("t5", "tokens", {"target_modules": ["q"], "trainable_token_indices": [3, 40]})
    yield Case("t5", "save-norm", {"target_modules": ["q"], "modules_to_save": ["final_layer_norm"]})
    for module in ("lm_head", "embed_tokens", "shared"):  # one weight under four names: no telling which to change
        yield Case("t5", module, {"target_modules": ["q", module]}, refused="tied")
    yield Case("t5", "save-head", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}, refused="tied")


def _grown() -> Iterator[Case]:
    """More tokens than the base has, saved by PEFT's default, which adds copies of the embedding layers."""
    more: dict[str, Any] = {"vocabulary": 52, "copies": True, "source": True, "config": {"vocab_size": 52}}
    both = {**QUERY_VALUE, "modules_to_save": ["embed_tokens", "lm_head"]}
    yield Case("llama", "save-both-grown-copies", both, **more)
    yield Case("llama-tied", "save-both-tying-grown-copies", {**both, "ensure_weight_tying": True}, **more)


CASES: tuple[Case, ...] = (
    *_every_architecture(), *_patterns(), *_initialisations(), *_embeddings_and_heads(), *_whole_modules(), *_biases(),
    *_tokens(), *_parameters(), *_sequence_to_sequence(), *_grown(),
)  # fmt: skip

# in bfloat16 and float16, every weight compared: no tied ones, on which PEFT's own merging errs
NARROW: tuple[Case, ...] = (
    Case("llama", "linears", _linears("llama")),
    Case("llama", "dora+rslora", {**_linears("llama"), "use_dora": True, "use_rslora": True}),
    Case("llama", "embedding+head", {"target_modules": ["embed_tokens", "lm_head"]}),
    Case("llama", "embedding+head-dora", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    Case("llama", "save-both", {**QUERY_VALUE, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    Case("qwen2", "bias-all", {**_linears("qwen2"), "bias": "all"}),
    Case("qwen2", "lora_bias", {**QUERY_VALUE, "lora_bias": True}),
    Case("llama", "tokens", {**QUERY_VALUE, "trainable_token_indices": [3, 40]}),
    Case("gpt2", "linears", _linears("gpt2")),
    Case("gpt2", "dora", {**_linears("gpt2"), "use_dora": True}),
    Case("mixtral", "experts", {"target_modules": ["q_proj"], "target_parameters": list(EXPERTS)}),
    Case("gpt_oss", "experts", {"target_modules": ["q_proj"], "target_parameters": list(EXPERTS)}),
    Case("llava", "linears", _linears("llava")),
)

# whose effect --scale multiplies, and those that have nothing to multiply
SCALED = ("llama-patterns", "gpt2-rslora", "gemma2-embedding+head", "mixtral-experts", "qwen2-lora_bias", "llama-pissa")
UNSCALED = ("llama-dora", "llama-save-norm", "qwen2-bias-all", "llama-tokens", "llama-classifier-linears")
