"""Where a model's parameters are on disk, asked of transformers: its own renamings and conversions, run on shapes.

Nothing is loaded: the model is built without weights, and each conversion is followed on the shapes in the headers
(`portllm.lm.names.tracing`), in the order in which transformers loads a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import Kind, Layout, Module, StoredBlock, whole
from portllm.errors import CheckpointError
from portllm.lm.names.building import meta_model
from portllm.lm.names.tracing import Traced

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


def built(base: Checkpoint, task_type: str | None = None, num_labels: int | None = None) -> Layout:
    """The layout of `base` as transformers loads it. Reads headers only, but for two stored copies of a tied weight.

    `task_type` is PEFT's: SEQ_CLS gives the sequence-classification model on this base, its head `num_labels` wide.
    Raises CheckpointError when config.json describes no model transformers knows, or other shapes than the files have.
    """
    model = meta_model(base, task_type, num_labels)
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
    """transformers' rules from names on disk to names in memory. They remember what they saw: names go in its order."""

    shapes: Mapping[str, Shape]
    prefix: str
    renamings: list[Any]
    converters: list[Any]

    @classmethod
    def of(cls, model: PreTrainedModel, shapes: Mapping[str, Shape]) -> _Names:
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
        """The parameter a tensor goes to and, where it goes through a conversion, the pattern it answers to there."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters = self.renamings, self.converters
        name, pattern = rename_source_key(disk, renamings, converters, self.prefix, self.shapes)
        if name not in self.shapes and disk in self.shapes:
            name, pattern = rename_source_key(disk, [], [], self.prefix, self.shapes)
        return str(name), pattern

    def converter(self, pattern: str) -> Any:
        """A fresh copy of the conversion that `pattern` belongs to."""
        return copy.deepcopy(next(rule for rule in reversed(self.converters) if pattern in rule.source_patterns))

    def targets(self, first: str, converter: Any) -> set[str]:
        """All the parameters a conversion makes, given the first."""
        patterns = converter.target_patterns
        return {first.replace(patterns[0], target) for target in patterns} & self.shapes.keys() | {first}


@dataclass(frozen=True)
class _Stored:
    """A parameter as its parts on disk give it."""

    shape: Shape
    parts: tuple[StoredBlock, ...]


@dataclass
class _Gathered:
    """Tensors on disk by the parameter they go to: as they are, or through a conversion."""

    plain: dict[str, str] = field(default_factory=dict)
    converted: dict[str, Any] = field(default_factory=dict)


def _gather(base: Checkpoint, names: _Names) -> _Gathered:
    """What convert_and_load_state_dict_in_model collects; of two tensors of one name the first is the one loaded."""
    from transformers.core_model_loading import dot_natural_key

    found = _Gathered()
    for disk in sorted(base.tensors, key=dot_natural_key):
        parameter, pattern = names.in_memory(disk)
        if parameter not in names.shapes:
            continue
        if pattern is None:
            found.plain.setdefault(parameter, disk)
            continue
        if parameter not in found.converted:
            found.converted[parameter] = names.converter(pattern)
        found.converted[parameter].add_tensor(parameter, disk, pattern, Traced.whole(disk, base.tensors[disk].shape))
    return found


def _trace(base: Checkpoint, model: PreTrainedModel, names: _Names) -> tuple[dict[str, _Stored], dict[str, str]]:
    """Each stored parameter with its parts, and those stored in a way that has no parts, with the reason."""
    found = _gather(base, names)
    stored = {
        name: _Stored(base.tensors[disk].shape, (whole(disk, base.tensors[disk].shape),))
        for name, disk in found.plain.items()
    }
    opaque: dict[str, str] = {}
    for first, converter in found.converted.items():
        targets = names.targets(first, converter)
        if not targets.isdisjoint(found.plain):
            opaque |= dict.fromkeys(targets, "both whole and in pieces")
            stored = {name: value for name, value in stored.items() if name not in targets}
            continue
        try:
            values = converter.convert(first, model=model, config=model.config)
            traced = {name: _only(value) for name, value in values.items() if name in names.shapes}
            stored |= {name: _Stored(value.shape, value.parts()) for name, value in traced.items()}
        except Exception:  # an operation may fail in any way on tensors that are not there
            reason = " and ".join(type(operation).__name__ for operation in converter.operations)
            opaque |= dict.fromkeys(targets, f"through {reason}")
    return stored, opaque


def _only(value: Any) -> Traced:
    """The array a conversion gives, alone or as a list of one. Raises TypeError."""
    array = value[0] if isinstance(value, list) else value
    if not isinstance(array, Traced):
        raise TypeError(f"expected a traced array, found {type(array).__name__}")
    return array


def _check_shapes(base: Checkpoint, shapes: Mapping[str, Shape], stored: Mapping[str, _Stored]) -> None:
    for name, value in stored.items():
        if value.shape != shapes[name]:
            disk = ", ".join(dict.fromkeys(part.tensor for part in value.parts[:2]))
            raise CheckpointError(
                f"{base.path}: {name} is {_times(shapes[name])} by config.json, {_times(value.shape)} in the files "
                f"({disk}); expected the same shape: is this config.json the one of these files?"
            )


def _modules(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> dict[str, Module]:
    """Every module with parameters or stored buffers of its own: PEFT saves both where it trains or replaces one."""
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
    base: Checkpoint, model: PreTrainedModel, stored: Mapping[str, _Stored], opaque: Mapping[str, str]
) -> dict[str, str]:
    """Parameters that transformers makes one on loading: each to the one of them that is on disk.

    As `tie_weights` does it: the one the class names if it is on disk, else the first that is; two on disk if equal.
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


def _equal(base: Checkpoint, one: _Stored | None, other: _Stored | None) -> bool:
    """Whether two parameters hold the same numbers, where each is one tensor on disk; else they stay two."""
    if one is None or other is None or len(one.parts) != 1 or len(other.parts) != 1:
        return False
    left, right = one.parts[0], other.parts[0]
    return left.transposed == right.transposed and base.entry(left.tensor).equals(base.entry(right.tensor))


def _absent(model: PreTrainedModel, names: _Names, absent: Iterable[str]) -> dict[str, str]:
    """For parameters not on disk, the name there under which transformers would find them.

    A tied weight gets the name save_pretrained gives it in a new model, where transformers would find it so.
    """
    found: dict[str, str] = {}
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for parameter in sorted(absent):
        candidates = [_saved_name(model, parameter)] if parameter in tied else []
        for name in (*candidates, parameter):
            if name is not None and names.in_memory(name) == (parameter, None):
                found[parameter] = name
                break
    return found


def _saved_name(model: PreTrainedModel, parameter: str) -> str | None:
    """What save_pretrained calls a parameter; None if it is not one tensor there."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        saved = revert_weight_conversion(model, {parameter: model.get_parameter_or_buffer(parameter)})
    except Exception:  # a rule that cannot be turned round
        return None
    return next(iter(saved)) if len(saved) == 1 else None


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a single number"
