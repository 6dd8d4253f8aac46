"""What a port refuses before anything is written, apart from what the changes themselves cannot be."""

from __future__ import annotations

from portllm.checkpoint.adapter.factors import check_finite
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.base import RELEASE, Base
from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.files.tensors import TensorEntry, times
from portllm.checkpoint.planning.changes import Plan
from portllm.checkpoint.planning.replacements import grew, is_new_head
from portllm.checkpoint.planning.tying import check_sides
from portllm.errors import CheckpointError, ParamsError, ShapeError, UnmatchedModulesError, UnsupportedPatchError


def refuse_by_headers(patch: Patch, base: Base, scale: float) -> None:
    """Refuse, from headers and configs, a base or patch that no plan can be made for.

    Raises CheckpointError, UnmatchedModulesError, ParamsError, UnsupportedPatchError.
    """
    refuse_quantised(base.checkpoint)
    _refuse_missing(patch, base)
    _refuse_scale(patch, scale)
    _refuse_untied(patch, base)


def refuse_by_values(patch: Patch, base: Base, old: Base | None) -> None:
    """Refuse, from the tensors' values, a patch that is not finite or whose copies of base weights are no copies.

    Raises PatchError, ShapeError, UnsupportedPatchError.
    """
    for entry in patch.header.tensors.values():
        check_finite(entry)
    check_saved(patch, base, old)
    check_sides(patch, base.layout)


def refuse_adapter(patch: Patch, plan: Plan) -> None:
    """Raise UnsupportedPatchError where a plan needs a merged checkpoint."""
    if plan.extended:
        raise UnsupportedPatchError(
            f"{patch.path}: the vocabulary grew, and the new rows of {plan.extended[0]} are in a copy of the base's "
            "weight, which no adapter can carry to another base; expected --as merged"
        )


def refuse_quantised(base: Checkpoint) -> None:
    """Raise CheckpointError for a base whose weights are quantised."""
    quantisation = base.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise CheckpointError(
            f"{base.path}: is quantised (quantization_config, method {method}), expected float32, bfloat16 or float16 "
            "weights; port onto the unquantised release and quantise the result"
        )


def check_saved(patch: Patch, base: Base, old: Base | None) -> None:
    """Prove that the base weights saved with the patch are copies: of `base`'s, or of `old`'s, the one it was made on.

    PEFT overwrites the base with them on loading; a port must not. Raises ShapeError, UnsupportedPatchError.
    """
    for parameter, entry in patch.saved.items():
        name = base.stored_tensor(f"{parameter}.weight")
        if name is None or (entry.shape != base.tensors[name].shape and not grew(entry, base.tensors[name].shape)):
            found = "no such weight" if name is None else times(base.tensors[name].shape)
            raise ShapeError(
                f"{parameter}: the patch carries a base weight of {times(entry.shape)}, {base.path} has {found}; "
                "is this a release of the base it was trained on?"
            )
        origins = [one.tensors[name] for one in (base, old) if one is not None and name in one.tensors]
        if not any(_is_copy(entry, origin) for origin in origins):
            hint = "is this the base it was trained on?" if old is not None else "pass that base as --from to prove it"
            raise UnsupportedPatchError(
                f"{entry.path}: {entry.name} is a base weight saved with the patch (save_embedding_layers); "
                f"expected a copy of the old base's, found another; {hint}"
            )


def _is_copy(entry: TensorEntry, origin: TensorEntry) -> bool:
    """Return whether a saved weight, or its first rows where a vocabulary grew, is a base's."""
    return (entry.first_rows(origin.shape[0]) if grew(entry, origin.shape) else entry).equals(origin)


def _refuse_missing(patch: Patch, base: Base) -> None:
    names = [*patch.modules, *patch.tokens, *patch.stacks, *patch.replaced]
    missing = [name for name in names if not _has(name, patch, base)]
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UnmatchedModulesError(
            f"{len(missing)} of the patch's {len(names)} modules are not in {base.path}: {some}; {RELEASE}"
        )


def _has(name: str, patch: Patch, base: Base) -> bool:
    if name in patch.stacks:
        return name in base.layout.modules
    parameter = name if name in patch.replaced else f"{name}.weight"
    return base.has(parameter) or is_new_head(parameter, patch, base)


def _refuse_scale(patch: Patch, scale: float) -> None:
    dora = (module for module, pair in patch.modules.items() if pair.magnitude is not None)
    unscaled = [*patch.replaced, *patch.tokens, *dora]
    if scale != 1.0 and unscaled:
        raise ParamsError(
            f"port.scale is {scale:g}, but {unscaled[0]} is replaced or renormalised (modules_to_save, trained "
            "tokens or biases, DoRA), which has no scale; expected 1"
        )


def _refuse_untied(patch: Patch, base: Base) -> None:
    """Refuse a base that does not tie what PEFT gives a module only because its base ties it to the embedding."""
    tied = [parameter.rpartition(".")[0] for parameter in base.layout.tied]
    for name in sorted(patch.follows_tie):
        if any(module.endswith(name) for module in tied):
            continue
        if f"{name}.weight" in patch.replaced:
            _refuse_copy(patch, f"{name}.weight")
        else:
            raise UnmatchedModulesError(
                f"{name}: the patch was trained where it is tied to the embedding, {base.path} does not tie "
                "them, so PEFT would not load it; expected a base that does (tie_word_embeddings)"
            )


def _refuse_copy(patch: Patch, parameter: str) -> None:
    """A head saved because it was tied is the embedding that was saved; any other is a copy of the old base's."""
    entry = patch.replaced[parameter]
    others = [other for name, other in patch.replaced.items() if name != parameter]
    if not any(entry.equals(other) for other in others):
        raise UnsupportedPatchError(
            f"{entry.path}: {entry.name} looks like a copy of the old base's (save_embedding_layers), which "
            "ensure_weight_tying hides; expected the embedding it is tied to, save the patch without copies"
        )
