"""A patch: a PEFT directory with plain LoRA, read one module at a time; anything else is refused by name.

Scaling and rank per module follow PEFT's own matching of rank_pattern and alpha_pattern.
LoRA: arXiv:2106.09685; rank-stabilised LoRA: arXiv:2312.03732.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from portllm.checkpoint.headers import Header, TensorEntry, read_header
from portllm.checkpoint.pairs import LoraPair as LoraPair
from portllm.checkpoint.pairs import TokenRows as TokenRows
from portllm.checkpoint.reader import read_json_object
from portllm.checkpoint.records import PatchRecord
from portllm.errors import PatchError, ShapeError, UnmatchedModulesError, UnsafeFileError, UnsupportedPatchError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
SAVED = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
FLOATS = ("F64", "F32", "F16", "BF16")

# keys that say nothing about the function of a trained patch, or that this module reads
HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "init_lora_weights", "bias", "megatron_core",
})  # fmt: skip
HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal")

# tensors PEFT writes beside lora_A and lora_B, and the feature each belongs to
FEATURES = {
    "lora_embedding_": "LoRA on an embedding",
    "lora_magnitude_vector": "DoRA (use_dora)",
    "lora_B.bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "trainable_tokens": "trainable_token_indices",
    "base_layer": "a saved copy of a base layer that has no LoRA (save_embedding_layers)",
    "embed_tokens.weight": "saved embeddings (save_embedding_layers)",
    ".bias": "trained biases (bias=all or lora_only)",
}


@dataclass(frozen=True)
class Patch:
    """A PEFT LoRA directory. `modules` is keyed by the module's name in the base model.

    `saved` holds the copies of base weights that PEFT puts beside LoRA on an output head; they are not part of the
    patch, and `plan.check_saved` proves that they are copies.
    """

    path: Path
    config: Mapping[str, Any]
    header: Header
    modules: Mapping[str, LoraPair]
    saved: Mapping[str, TensorEntry]
    record: PatchRecord | None
    stacks: Mapping[str, tuple[LoraPair, ...]] = field(default_factory=dict)
    replaced: Mapping[str, TensorEntry] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    init: Literal["plain", "pissa", "olora"] = "plain"

    @classmethod
    def open(cls, path: Path) -> Patch:
        """Read config and header, refusing by name what is not plain LoRA; reads no tensor data.

        Raises PatchError, UnsupportedPatchError, ShapeError, UnsafeFileError or CheckpointError.
        """
        if not path.is_dir():
            raise PatchError(f"{path}: expected a PEFT directory, found {_kind(path)}; check the path")
        config = _config(path)
        _refuse_features(config, path)
        header = read_header(_weights(path))
        modules, saved = _pairs(config, header)
        record = PatchRecord.read(path) if (path / PatchRecord.FILE).is_file() else None
        return cls(path, config, header, modules, saved, record)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether PEFT was told that the base stores its weights transposed (GPT-2's Conv1D)."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def ensure_weight_tying(self) -> bool:
        """Whether the base's tied weights were kept tied in training."""
        return bool(self.config.get("ensure_weight_tying"))


def scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """(rank, alpha/r or alpha/√r) that PEFT gives `module`. Raises PatchError."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(_pattern(ranks, module), config.get("r"))
    alpha = alphas.get(_pattern(alphas, module), config.get("lora_alpha"))
    if type(rank) is not int or rank < 1:
        raise PatchError(f"{CONFIG}: r of {module} must be a positive whole number, found {rank!r}; mend the config")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise PatchError(f"{CONFIG}: lora_alpha of {module} must be a finite number, found {alpha!r}; mend the config")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    # PEFT: the first key, in the file's order, that matches the module's name or its tail at a dot
    for key in patterns:
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return key
        except re.error as error:
            raise PatchError(
                f"{CONFIG}: pattern {key!r} is not a regular expression ({error}); mend the config"
            ) from error
    return module


def _config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise PatchError(f"{path}: has no {CONFIG}; expected a directory written by PEFT's save_pretrained")
    config = read_json_object(path / CONFIG)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise PatchError(f"{path / CONFIG}: {key} must be an object, found {config[key]!r}; mend the config")
    return config


def _weights(path: Path) -> Path:
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if not pickles:
        raise PatchError(f"{path}: has no {WEIGHTS}; expected a directory written by PEFT's save_pretrained")
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "tensors = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); "
        "save_file({k: v.contiguous() for k, v in tensors.items()}, sys.argv[2])"
    )
    command = shlex.join(["python", "-c", code, str(path / pickles[0]), str(path / WEIGHTS)])
    raise UnsafeFileError(f"{path / pickles[0]}: is a pickle file, expected {WEIGHTS}; convert it with: {command}")


def _refuse_features(config: Mapping[str, Any], path: Path) -> None:
    """Raise UnsupportedPatchError for the first feature that is not plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _unsupported(path, f"peft_type {kind!r}", "peft_type LORA")
    if config.get("bias", "none") != "none":
        raise _unsupported(path, f"bias={config['bias']}", "bias=none")
    init = config.get("init_lora_weights")
    if not any(init is known or (isinstance(known, str) and init == known) for known in HARMLESS_INITS):
        raise _unsupported(
            path, f"init_lora_weights={init} (which alters the base or the patch)", "a patch converted to plain LoRA"
        )
    for key in sorted(set(config) - HARMLESS):
        if config[key] not in (None, False, {}, [], ""):
            raise _unsupported(path, f"{key}={_short(config[key])}", "plain LoRA")


def _pairs(config: Mapping[str, Any], header: Header) -> tuple[dict[str, LoraPair], dict[str, TensorEntry]]:
    """Every tensor of the file as one half of a pair or as a saved base weight; nothing is left over."""
    sides: dict[str, dict[str, TensorEntry]] = {}
    saved: dict[str, TensorEntry] = {}
    for name, entry in header.tensors.items():
        if match := KEY.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = entry
        elif match := SAVED.fullmatch(name):
            saved[match["module"]] = entry
        else:
            raise _foreign(name, header.path)
    if alone := sorted(saved.keys() - sides.keys()):
        raise _foreign(saved[alone[0]].name, header.path)
    if not sides:
        raise PatchError(f"{header.path}: holds no tensors; expected lora_A and lora_B weights, train the patch again")
    return {module: _pair(config, module, sides[module], header.path) for module in sorted(sides)}, saved


def _pair(config: Mapping[str, Any], module: str, sides: Mapping[str, TensorEntry], path: Path) -> LoraPair:
    for side in "AB":
        if side not in sides:
            raise PatchError(f"{path}: {module} has no lora_{side}; expected both factors, the file is incomplete")
        if sides[side].dtype not in FLOATS:
            raise PatchError(
                f"{path}: {sides[side].name} has dtype {sides[side].dtype}, expected one of {', '.join(FLOATS)}; "
                "save the patch in a floating dtype"
            )
    a, b = sides["A"], sides["B"]
    rank, scale = scaling(config, module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ShapeError(
            f"{module}: lora_A is {_times(a.shape)} and lora_B is {_times(b.shape)}, expected r={rank} between them "
            f"({CONFIG}); was the patch saved whole?"
        )
    return LoraPair(module, "linear", path, a, b, rank, scale)


def _foreign(name: str, path: Path) -> PatchError:
    for mark, feature in FEATURES.items():
        if mark in name:
            return UnsupportedPatchError(
                f"{path}: tensor {name} belongs to {feature}, which portllm does not port yet; expected plain LoRA"
            )
    return UnmatchedModulesError(
        f"{path}: tensor {name} is not PEFT's LoRA; expected {PREFIX}<module>.lora_A.weight or lora_B.weight"
    )


def _unsupported(path: Path, found: str, expected: str) -> UnsupportedPatchError:
    return UnsupportedPatchError(f"{path / CONFIG}: {found} is not supported yet; expected {expected}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "nothing"
