"""adapter_config.json: read, its types checked, and each feature that portllm does not port refused by name.

The keys are those of peft's LoraConfig (0.2 to 0.21); the value of any other key must be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from portllm.checkpoint.adapter.patterns import PLAIN
from portllm.checkpoint.files.names import ADAPTER_CONFIG as CONFIG
from portllm.checkpoint.files.reading import read_json_object, reading
from portllm.errors import PatchError, UnsupportedPatchError

MAX_BYTES = 8 << 20
MAX_NAMES, MAX_CHARACTERS = 500, 200  # of modules_to_save and layers_pattern, each matched against every module

Init = Literal["plain", "pissa", "olora"]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(_whole(item) and item >= 0 for item in value)


def _tokens(value: Any) -> bool:
    return _naturals(value) or (isinstance(value, dict) and all(_naturals(item) for item in value.values()))


Check = tuple[str, Callable[[Any], bool]]
FLAG: Check = ("true or false", lambda v: isinstance(v, bool))
TEXT: Check = ("text", lambda v: isinstance(v, str))
TEXTS: Check = ("a list of names", _texts)
NAMES: Check = ("a name or a list of names", lambda v: isinstance(v, str) or _texts(v))

TYPES: Mapping[str, Check] = {
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"), FLAG),
    **dict.fromkeys(("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision"), TEXT),
    **dict.fromkeys(("modules_to_save", "target_parameters"), TEXTS),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), NAMES),
    "r": ("a whole number", _whole),
    "lora_alpha": ("a number", _number),
    "lora_dropout": ("a number", _number),
    "bias": ("none, all or lora_only", lambda v: v in ("none", "all", "lora_only")),
    "rank_pattern": ("an object", lambda v: isinstance(v, dict) and all(map(_whole, v.values()))),
    "alpha_pattern": ("an object", lambda v: isinstance(v, dict) and all(map(_number, v.values()))),
    "layers_to_transform": ("layer numbers", lambda v: _whole(v) or (isinstance(v, list) and all(map(_whole, v)))),
    "trainable_token_indices": ("token numbers, or an object of them by module", _tokens),
    "init_lora_weights": ("true, false or text", lambda v: isinstance(v, bool | str)),
}

# keys without effect on a trained patch: init_lora_weights decides about the configurations of initialisations
HARMLESS = frozenset({
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_ga_config", "megatron_core",
    "merge_weights", "qalora_group_size", "runtime_config",
})  # fmt: skip

REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA acts on some tokens only, which no weight can; use it unmerged in PEFT",
    "arrow_config": "a router chooses among several adapters per token; port each of them",
    "kasa_config": "KaSA truncated the base's weights; train the patch with plain LoRA",
    "layer_replication": "the model has more layers than its base; save the merged model with PEFT",
    "megatron_config": "the patch is sharded by Megatron; save it as plain LoRA",
    "monteclora_config": "the factors are random variables; save their means as plain LoRA",
    "use_bdlora": "the factors are packed in blocks; save them as plain LoRA",
    "use_qalora": "the inputs are pooled for a quantised base; train the patch with plain LoRA",
    "velora_config": "VeLoRA is not known to be plain LoRA after training; train the patch with plain LoRA",
}

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # none of them alters the base
CONVERT = "convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
ALTERING_INITS: Mapping[str, str] = {
    "pissa_niter_": f"its random start cannot be computed again; {CONVERT}",
    "corda": f"its start depends on data; {CONVERT}",
    "lora_ga": f"its start depends on gradients; {CONVERT}",
    "loftq": "it was trained on a base quantised by LoftQ; train the patch with plain LoRA",
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of `folder`, checked. Raises PatchError, UnsupportedPatchError, CheckpointError."""
    path = folder / CONFIG
    if not path.exists():
        raise PatchError(f"{folder}: has no {CONFIG}; expected a directory written by PEFT's save_pretrained")
    config = _read(path)
    _refuse_kind(config, path)
    _check_types(config, path)
    _refuse_features(config, path)
    _check_combinations(config, path)
    return config


def init_of(config: Mapping[str, Any], path: Path) -> Init:
    """Return how init_lora_weights altered the base: not at all, or in a way that can be computed again.

    Raises UnsupportedPatchError. By peft's tuners/lora/layer.py, gaussian, orthogonal, EVA and MiCA set only the
    factors.
    """
    init = config.get("init_lora_weights")
    if any(init is plain or (isinstance(plain, str) and init == plain) for plain in PLAIN_INITS):
        return "plain"
    text = str(init)
    if text == "pissa":
        return "pissa"
    if text.lower() == "olora":
        return "olora"
    for start, hint in ALTERING_INITS.items():
        if text.startswith(start):
            raise UnsupportedPatchError(f"{path}: init_lora_weights={text} altered the base: {hint}")
    raise UnsupportedPatchError(
        f"{path}: init_lora_weights={short(init)} is not known; expected true, false or one of gaussian, orthogonal, "
        f"eva, mica, pissa, olora; {CONVERT}"
    )


def _read(path: Path) -> dict[str, Any]:
    with reading(path):
        size = path.stat().st_size
    if size > MAX_BYTES:
        raise PatchError(f"{path}: has {size} bytes, expected at most {MAX_BYTES}; fetch the patch again")
    return read_json_object(path, once=True)


def _refuse_kind(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedPatchError(
            f"{path}: peft_type {short(kind)} is not supported; expected peft_type LORA, train such a patch or merge "
            "it with PEFT"
        )


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    for key, (expected, check) in TYPES.items():
        value = config.get(key)
        if value is not None and not check(value):
            raise PatchError(f"{path}: {key} must be {expected}, found {short(value)}; correct {CONFIG}")
    for key in ("modules_to_save", "layers_pattern"):
        names = names_of(config, key)
        # PEFT also accepts regular expressions here; portllm does not
        for name in names:
            if not PLAIN.fullmatch(name) or len(name) > MAX_CHARACTERS or len(names) > MAX_NAMES:
                raise PatchError(
                    f"{path}: {key} must be at most {MAX_NAMES} names of modules, found {short(name)} among "
                    f"{len(names)}; correct {CONFIG}"
                )


def _refuse_features(config: Mapping[str, Any], path: Path) -> None:
    """Raise UnsupportedPatchError for the first feature that portllm does not port."""
    init_of(config, path)
    for key in sorted(set(config) - set(TYPES) - HARMLESS):
        if config[key] in (None, False, {}, [], ""):
            continue
        hint = REFUSED.get(
            key, "portllm does not support this key, expected it empty; train without it or merge with PEFT"
        )
        raise UnsupportedPatchError(f"{path}: {key}={short(config[key])} is not supported: {hint}")


def _check_combinations(config: Mapping[str, Any], path: Path) -> None:
    """Raise PatchError for combinations that PEFT's own LoraConfig refuses, so that PEFT cannot have trained them."""
    if isinstance(config.get("target_modules"), str) and config.get("layers_to_transform") is not None:
        raise PatchError(
            f"{path}: layers_to_transform needs target_modules as a list, found a pattern; correct {CONFIG}"
        )
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        raise PatchError(f"{path}: layers_pattern needs layers_to_transform, found none; correct {CONFIG}")
    if config.get("lora_bias") and config.get("use_dora"):
        raise PatchError(f"{path}: lora_bias and use_dora exclude each other, found both; correct {CONFIG}")
    if config.get("target_parameters") and init_of(config, path) != "plain":
        raise UnsupportedPatchError(
            f"{path}: init_lora_weights={config['init_lora_weights']} with target_parameters is not supported; "
            "expected true; train the patch so"
        )


def names_of(config: Mapping[str, Any], key: str) -> list[str]:
    """Return the names under `key`, which may be one name, a list of names, or absent."""
    value = config.get(key) or []
    return [value] if isinstance(value, str) else list(value)


def short(value: Any) -> str:
    """Return a value from the file as text of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
