"""Find where a model's parameters are on disk, by look-up or by transformers' own renamings and conversions.

No weights are loaded: the model is built on the meta device, and each conversion is followed on the shapes in the
headers (`portllm.lm.names.tracing`), in the order in which transformers loads a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.base.base import Base
from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import PLAIN, Kind, Layout, Module, StoredBlock, plain, whole
from portllm.errors import CheckpointError
from portllm.lm.names.building import ModelConfig, meta_model
from portllm.lm.names.tracing import Traced

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Dimensions = tuple[int, ...]


def layout_of(base: Checkpoint) -> Layout:
    """Return the layout of `base`; only families that are not plain cost the import of transformers (seconds).

    Nothing renames a model with code of its own, which portllm does not run, and of a type that transformers lacks:
    its names on disk are those in memory, and config.json says which weights are tied. Raises CheckpointError.
    """
    kind = base.config.get("model_type")
    if kind in PLAIN:
        return plain(base)
    if base.config.get("auto_map"):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if kind not in CONFIG_MAPPING:
            return plain(base)
    return built(base)


def open_base(path: Path) -> Base:
    """Return the base at `path`: its checkpoint, with the layout of its architecture. Raises CheckpointError."""
    checkpoint = Checkpoint.open(path)
    return Base(checkpoint, layout_of(checkpoint))


def built(base: Checkpoint, task_type: str | None = None, num_labels: int | None = None) -> Layout:
    """Return the layout of `base` as transformers loads it, from headers and, at most, two copies of a tied weight.

    `task_type` is PEFT's: SEQ_CLS gives the sequence-classification model on this base, its head `num_labels` wide.
    Raises CheckpointError when config.json describes no model of transformers, or other shapes than the files have.
    """
    model = meta_model(ModelConfig.of(base), task_type, num_labels)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = _Names.of(model, shapes)
    parts, opaque = _trace(base, model, names)
    _check_shapes(base, shapes, parts)
    return Layout(
        modules=_modules(model, shapes),
        blocks={name: value.parts for name, value in parts.items()},
        tied=_tied(base, model, parts, opaque),
        opaque=opaque,
        absent=_absent(model, names, shapes.keys() - parts.keys() - opaque.keys()),
        architecture=type(model).__name__,
    )


@dataclass(frozen=True)
class _Names:
    """transformers' rules from names on disk to names in memory. Rules have state, so names pass in its order."""

    shapes: Mapping[str, Dimensions]
    prefix: str
    renamings: list[Any]
    converters: list[Any]

    @classmethod
    def of(cls, model: PreTrainedModel, shapes: Mapping[str, Dimensions]) -> _Names:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        return cls(
            shapes,
            model.base_model_prefix,
            [rule for rule in rules if isinstance(rule, WeightRenaming)],
            [rule for rule in rules if isinstance(rule, WeightConverter)],
        )

    def in_memory(self, disk: str) -> tuple[str, str | None]:
        """Return the parameter of a tensor and, where a conversion makes it, the pattern that the tensor matches."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters = self.renamings, self.converters
        name, pattern = rename_source_key(disk, renamings, converters, self.prefix, self.shapes)
        if name not in self.shapes and disk in self.shapes:
            name, pattern = rename_source_key(disk, [], [], self.prefix, self.shapes)
        return str(name), pattern

    def converter(self, pattern: str) -> Any:
        """Return a new copy of the conversion that `pattern` belongs to."""
        return copy.deepcopy(next(rule for rule in reversed(self.converters) if pattern in rule.source_patterns))

    def targets(self, first: str, converter: Any) -> set[str]:
        """Return all parameters that a conversion makes, given the first."""
        patterns = converter.target_patterns
        return {first.replace(patterns[0], target) for target in patterns} & self.shapes.keys() | {first}


@dataclass(frozen=True)
class _StoredParameter:
    """The shape of a parameter and its parts on disk."""

    shape: Dimensions
    parts: tuple[StoredBlock, ...]


@dataclass
class _Gathered:
    """Tensors on disk by the parameter they go to: as they are, or through a conversion."""

    plain: dict[str, str] = field(default_factory=dict)
    converted: dict[str, Any] = field(default_factory=dict)


def _gather(base: Checkpoint, names: _Names) -> _Gathered:
    """Collect what convert_and_load_state_dict_in_model does; of two tensors of one name it loads the first."""
    from transformers.core_model_loading import dot_natural_key

    gathered = _Gathered()
    for disk in sorted(base.tensors, key=dot_natural_key):
        parameter, pattern = names.in_memory(disk)
        if parameter not in names.shapes:
            continue
        if pattern is None:
            gathered.plain.setdefault(parameter, disk)
            continue
        if parameter not in gathered.converted:
            gathered.converted[parameter] = names.converter(pattern)
        gathered.converted[parameter].add_tensor(parameter, disk, pattern, Traced.whole(disk, base.tensors[disk].shape))
    return gathered


def _trace(
    base: Checkpoint, model: PreTrainedModel, names: _Names
) -> tuple[dict[str, _StoredParameter], dict[str, str]]:
    """Return each stored parameter with its parts, and those stored in a way that has no parts, with the reason."""
    gathered = _gather(base, names)
    stored = {
        name: _StoredParameter(base.tensors[disk].shape, (whole(disk, base.tensors[disk].shape),))
        for name, disk in gathered.plain.items()
    }
    opaque: dict[str, str] = {}
    for first, converter in gathered.converted.items():
        targets = names.targets(first, converter)
        if not targets.isdisjoint(gathered.plain):
            opaque |= dict.fromkeys(targets, "both fused and in pieces")
            stored = {name: value for name, value in stored.items() if name not in targets}
            continue
        try:
            values = converter.convert(first, model=model, config=model.config)
            traced = {name: _only(value) for name, value in values.items() if name in names.shapes}
            stored |= {name: _StoredParameter(value.shape, value.parts()) for name, value in traced.items()}
        except Exception:  # an operation may raise anything on tensors without values
            reason = " and ".join(type(operation).__name__ for operation in converter.operations)
            opaque |= dict.fromkeys(targets, f"through {reason}")
    return stored, opaque


def _only(value: Any) -> Traced:
    """Return the array that a conversion gives, alone or as a list of one. Raises TypeError."""
    array = value[0] if isinstance(value, list) else value
    if not isinstance(array, Traced):
        raise TypeError(f"expected a traced array, found {type(array).__name__}")
    return array


def _check_shapes(base: Checkpoint, shapes: Mapping[str, Dimensions], stored: Mapping[str, _StoredParameter]) -> None:
    for name, value in stored.items():
        if value.shape != shapes[name]:
            disk = ", ".join(dict.fromkeys(part.tensor for part in value.parts[:2]))
            raise CheckpointError(
                f"{base.path}: {name} is {_times(shapes[name])} by config.json, {_times(value.shape)} in the files "
                f"({disk}); expected the same shape: is this config.json the one of these files?"
            )


def _modules(model: PreTrainedModel, shapes: Mapping[str, Dimensions]) -> dict[str, Module]:
    """Return every module with parameters or stored buffers: PEFT saves both where it trains or replaces a module."""
    modules: dict[str, Module] = {}
    for name, module in model.named_modules():
        own = [key for keys in (module._parameters, module._buffers) for key in keys]
        full = {key: f"{name}.{key}" if name else key for key in own}
        if held := {key: shapes[path] for key, path in full.items() if path in shapes}:
            modules[name] = Module(_kind(module), held, transposed=bool(getattr(module, "is_transposed", False)))
    return modules


def _kind(module: nn.Module) -> Kind:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[tuple[type[nn.Module], Kind], ...] = (
        (nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Embedding, "embedding"),
    )  # fmt: skip
    return next((kind for known, kind in kinds if isinstance(module, known)), "other")


def _tied(
    base: Checkpoint, model: PreTrainedModel, stored: Mapping[str, _StoredParameter], opaque: Mapping[str, str]
) -> dict[str, str]:
    """Map each parameter that transformers ties on loading to the one of its group that is on disk.

    Chosen as `tie_weights` does: the one that the class names if it is on disk, else the first that is. Two on disk
    are tied where they are equal.
    """
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    tied: dict[str, str] = {}
    for members in groups.values():
        present = [name for name in members if name in stored or name in opaque]
        kept = present[0] if present else members[0]
        for name in members:
            if name != kept and (name not in present or _equal(base, stored.get(name), stored.get(kept))):
                tied[name] = kept
    return tied


def _equal(base: Checkpoint, one: _StoredParameter | None, other: _StoredParameter | None) -> bool:
    """Return whether two parameters, each one tensor on disk, contain the same numbers."""
    if one is None or other is None or len(one.parts) != 1 or len(other.parts) != 1:
        return False
    left, right = one.parts[0], other.parts[0]
    return left.transposed == right.transposed and base.entry(left.tensor).equals(base.entry(right.tensor))


def _absent(model: PreTrainedModel, names: _Names, absent: Iterable[str]) -> dict[str, str]:
    """Return, for each parameter not on disk, the name under which transformers would find it there.

    A tied weight gets the name that save_pretrained gives it in a new model, where transformers finds that name.
    """
    names_on_disk: dict[str, str] = {}
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for parameter in sorted(absent):
        candidates = [_saved_name(model, parameter)] if parameter in tied else []
        for name in (*candidates, parameter):
            if name is not None and names.in_memory(name) == (parameter, None):
                names_on_disk[parameter] = name
                break
    return names_on_disk


def _saved_name(model: PreTrainedModel, parameter: str) -> str | None:
    """Return the name that save_pretrained gives a parameter; None if it is not one tensor there."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        saved = revert_weight_conversion(model, {parameter: model.get_parameter_or_buffer(parameter)})
    except Exception:  # a rule without an inverse
        return None
    return next(iter(saved)) if len(saved) == 1 else None


def _times(shape: Dimensions) -> str:
    return "×".join(map(str, shape)) or "a single number"
