"""Which patch module changes which checkpoint tensor: decided from headers alone, whole, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from portllm.checkpoint.headers import TensorEntry
from portllm.checkpoint.patch import LoraPair, Patch
from portllm.checkpoint.reader import Checkpoint, equal_values
from portllm.errors import CheckpointError, ShapeError, UnmatchedModulesError, UnsupportedPatchError

DTYPES = ("F32", "BF16", "F16")

# transformers' Conv1D keeps its weight as (in, out); these are the model types and modules that use it
CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

# names in memory that differ on disk, per model type (transformers' conversion mapping)
RENAMED = {"gpt_neox": {"lm_head": "embed_out"}}

# published without their language-model class: transformers adds the prefix when no tensor has it
BASE_PREFIX = {"gpt2": "transformer."}

HEADS = frozenset({"lm_head", "embed_out"})
# model types whose class unties the head when config.json does not say
UNTIED_BY_DEFAULT = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "phi3", "olmo2", "granite", "stablelm",
})  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One checkpoint tensor and the update it gets; `transposed` where the tensor is stored as (in, out)."""

    entry: TensorEntry
    pair: LoraPair
    transposed: bool


@dataclass(frozen=True)
class Plan:
    """Every change, by tensor name, and how many of the base's linear modules that is."""

    changes: Mapping[str, Change]
    matched: int
    total: int


def make_plan(patch: Patch, base: Checkpoint) -> Plan:
    """Match every module of `patch` to a tensor of `base`. Reads nothing but headers.

    Raises CheckpointError (quantised base), UnmatchedModulesError, ShapeError, each naming what does not fit.
    """
    refuse_quantised(base)
    names = {module: tensor_name(module, base) for module in patch.modules}
    if missing := [module for module, name in names.items() if name not in base.where]:
        raise UnmatchedModulesError(_unmatched(missing, patch, base))
    changes: dict[str, Change] = {}
    for module, name in names.items():
        if name in changes:
            raise UnmatchedModulesError(
                f"{module} and {changes[name].pair.module} are both {name} of {base.path}; expected one update each"
            )
        _refuse_tied_head(module, name, base)
        changes[name] = _change(patch, module, base.entry(name), base)
    return Plan(changes, len(changes), len(linears(base) | set(changes)))


def check_saved(patch: Patch, base: Checkpoint, source: Checkpoint | None) -> None:
    """Prove that the base weights saved with the patch are copies: of `base`'s, or of `source`'s, the old base.

    PEFT overwrites the base with them on loading; a port must not. Raises ShapeError, UnsupportedPatchError.
    """
    for module, entry in patch.saved.items():
        name = tensor_name(module, base)
        if entry.shape != base.shape(name):
            raise ShapeError(
                f"{module}: the patch carries a base weight of {_times(entry.shape)}, {base.path} has "
                f"{_times(base.shape(name))}; a grown vocabulary is not supported yet"
            )
        origins = [c for c in (base, source) if c is not None and name in c.where]
        if not any(equal_values((patch.header.path, entry), (c.where[name].path, c.entry(name))) for c in origins):
            hint = (
                "is this the base it was trained on?" if source is not None else "pass that base as --from to prove it"
            )
            raise UnsupportedPatchError(
                f"{patch.header.path}: {entry.name} is a base weight saved with the patch (save_embedding_layers); "
                f"expected a copy of the old base's, found another; {hint}"
            )


def tensor_name(module: str, base: Checkpoint) -> str:
    """The checkpoint tensor that holds the weight of `module`."""
    name = f"{module}.weight"
    if name in base.where:
        return name
    kind = str(base.config.get("model_type"))
    prefix = BASE_PREFIX.get(kind)
    if prefix and not any(known.startswith(prefix) for known in base.where):
        return name.removeprefix(prefix)
    return f"{RENAMED.get(kind, {}).get(module, module)}.weight"


def linears(base: Checkpoint) -> set[str]:
    """Names of the base's linear weights: two-dimensional `*.weight` tensors that are no embedding tables."""
    return {
        name for name in base.where if name.endswith(".weight") and len(base.shape(name)) == 2 and not _embedding(name)
    }


def refuse_quantised(base: Checkpoint) -> None:
    """Raise CheckpointError for a base whose weights are quantised."""
    quantisation = base.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise CheckpointError(
            f"{base.path}: is quantised (quantization_config, method {method}), expected float32, bfloat16 or float16 "
            "weights; port onto the unquantised release and quantise the result"
        )


def _change(patch: Patch, module: str, entry: TensorEntry, base: Checkpoint) -> Change:
    pair = patch.modules[module]
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{base.path}: {entry.name} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}; "
            "port onto the release in floating point"
        )
    transposed = _is_conv1d(module, base)
    expected = pair.shape[::-1] if transposed else pair.shape
    if entry.shape != expected:
        raise ShapeError(
            f"{module}: patch is {_times(expected)}, base tensor {entry.name} is {_times(entry.shape)}; "
            "is this a release of the base the patch was trained on?"
        )
    if patch.fan_in_fan_out and not transposed and entry.shape[0] == entry.shape[1] and not _plain(base):
        raise ShapeError(
            f"{module}: the patch says fan_in_fan_out and the base tensor is square, so its layout cannot be told; "
            f"expected a known model_type, found {base.config.get('model_type')!r}"
        )
    return Change(entry, pair, transposed)


def _is_conv1d(module: str, base: Checkpoint) -> bool:
    return base.config.get("model_type") in CONV1D_TYPES and module.rpartition(".")[2] in CONV1D_MODULES


def _plain(base: Checkpoint) -> bool:
    return base.config.get("model_type") in UNTIED_BY_DEFAULT | CONV1D_TYPES


def _refuse_tied_head(module: str, name: str, base: Checkpoint) -> None:
    head = module.rpartition(".")[2] in HEADS or base.shape(name)[:1] == (base.config.get("vocab_size"),)
    tied = base.config.get("tie_word_embeddings")
    if tied is None:
        tied = base.config.get("model_type") not in UNTIED_BY_DEFAULT
    if head and tied:
        raise UnmatchedModulesError(
            f"{module}: the base ties its head to the input embedding (tie_word_embeddings), so an update of one "
            "would change both; expected an untied head. Not supported yet: train the patch without it"
        )


def _unmatched(missing: list[str], patch: Patch, base: Checkpoint) -> str:
    some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if (
        any(module.rpartition(".")[2] in HEADS for module in missing)
        and base.config.get("tie_word_embeddings") is not False
    ):
        hint = "a tied output head is not on disk and is not supported yet: train the patch without it"
    else:
        hint = "is this a release of the base the patch was trained on?"
    return f"{len(missing)} of the patch's {len(patch.modules)} modules are not in {base.path}: {some}; {hint}"


def _embedding(name: str) -> bool:
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return leaf not in HEADS and ("embed" in leaf or leaf in ("wte", "wpe", "shared", "relative_attention_bias"))


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
