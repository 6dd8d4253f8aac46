"""Build the model that a config.json describes on torch's meta device, without weights: fast at any size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.errors import CheckpointError
from portllm.lm.quiet import quieten

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# PEFT's task types that put another head on a base than its own, with transformers' table of the classes
HEADS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
# where a config names no class that transformers has, in this order
FAMILIES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
BARE = "MODEL_MAPPING_NAMES"

# far more than any model has; a config that asks for more would build without end
COUNTS = ("layer", "layers", "labels")
MAX_COUNT = 30_000
MAX_LAYERS = 1_000  # of a config without files; a checkpoint has a tensor or more for each
MAX_PARAMETERS = 200_000


@dataclass(frozen=True)
class ModelConfig:
    """A model's config: its content, its file or, where it has none, a name; it may ask for `max_layers` at most."""

    content: Mapping[str, Any]
    where: Path | str
    max_layers: int = MAX_LAYERS

    @classmethod
    def of(cls, base: Checkpoint) -> ModelConfig:
        """Return the config of a checkpoint; no model has more layers than tensors."""
        return cls(base.config, base.path / "config.json", min(MAX_COUNT, max(MAX_LAYERS, len(base.tensors))))

    def check(self) -> None:
        """Raise CheckpointError for more layers or labels than any model has: config classes make lists that long."""
        self._check(self.content)

    def _check(self, section: Mapping[str, Any]) -> None:
        for key, value in section.items():
            most = MAX_COUNT if key.endswith("labels") else self.max_layers
            if isinstance(value, dict):
                self._check(value)
            elif isinstance(value, int) and key.endswith(COUNTS) and value > most:
                raise CheckpointError(
                    f"{self.where}: expected {key} of at most {most}, found {value}; fetch the file again"
                )


def meta_model(config: ModelConfig, task_type: str | None = None, num_labels: int | None = None) -> PreTrainedModel:
    """Return the model of `config` on the meta device, its weights not tied; only transformers' own code runs.

    `task_type` is PEFT's: a base of another kind gets that kind's head, with `num_labels` labels where it has labels.
    Raises CheckpointError when the config describes no model that transformers contains.
    """
    config.check()
    quieten()
    own = _parsed(config)
    model_class = _model_class(config.where, own, task_type)
    try:
        own = _own_config(model_class, own) or own
        if num_labels is not None:
            own.num_labels = num_labels
        with _meta(model_class):
            return model_class(own)
    except Exception as error:
        raise _unbuildable(config.where, model_class.__name__, error) from error


def _parsed(config: ModelConfig) -> PreTrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if config.content.get("auto_map"):
            raise CheckpointError(
                f"{config.where}: model_type {kind!r} needs code of its own (auto_map), expected one that transformers "
                "contains; portllm runs no code from a checkpoint"
            )
        raise CheckpointError(
            f"{config.where}: expected a model_type that transformers contains, found {kind!r}; "
            "is transformers recent enough for this model?"
        )
    try:
        with _no_warnings():
            if isinstance(config.where, Path):
                return CONFIG_MAPPING[kind].from_json_file(config.where)
            return CONFIG_MAPPING[kind](**copy.deepcopy(dict(config.content)))
    except Exception as error:
        raise _unbuildable(config.where, f"{kind} config", error) from error


def _model_class(where: Path | str, config: PreTrainedConfig, task_type: str | None) -> type[PreTrainedModel]:
    """Return the class config.json names, unless `task_type` requires another head; else that of the first family."""
    from transformers.models.auto import modeling_auto

    named = _named_class(config)
    if table := HEADS.get(task_type or ""):
        families: tuple[str, ...] = (table,)
        keep = named is not None and named.__name__ in _names(modeling_auto, table, config)
    else:
        families = FAMILIES
        keep = named is not None and (task_type is None or named.__name__ not in _names(modeling_auto, BARE, config))
    if keep and named is not None:
        return named
    for family in families:
        for name in _names(modeling_auto, family, config):
            if model_class := _class(name):
                return model_class
    head = task_type or "language model"
    raise CheckpointError(
        f"{where}: expected a model_type with a {head} class in transformers, found "
        f"{config.model_type!r}; is this the base of this patch?"
    )


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return architectures[0], where transformers contains it and it takes this config."""
    names = config.architectures or []
    named = _class(names[0]) if isinstance(names, list) and names else None
    return named if named is not None and _own_config(named, config) is not None else None


def _own_config(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the config that a class takes: this one, or the text part of this one; None where it takes neither."""
    config_class = model_class.config_class or ()
    return next((own for own in (config, config.get_text_config()) if isinstance(own, config_class)), None)


def _names(tables: Any, table: str, config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of the classes that a table of transformers' lists for this model type."""
    names = getattr(tables, table).get(config.model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _class(name: object) -> type[PreTrainedModel] | None:
    """Return a model class of transformers by its name; imports that model's file only."""
    import transformers

    if not isinstance(name, str) or not name.isidentifier():
        return None
    named = getattr(transformers, name, None)
    return named if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) else None


@contextmanager
def _meta(model_class: type[PreTrainedModel]) -> Iterator[None]:
    """Build inside as from_pretrained does, on the meta device: weights not tied, no warnings, limited parameters."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def limit(_module: nn.Module, name: str, _parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > MAX_PARAMETERS:
            raise ValueError(f"more than {MAX_PARAMETERS} parameters, at {name}")

    with ExitStack() as stack:
        stack.enter_context(_no_warnings())
        for context in model_class.get_init_context(torch.float32, False, False, None):
            stack.enter_context(context)
        handle = register_module_parameter_registration_hook(limit)
        stack.callback(handle.remove)
        yield


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unbuildable(where: Path | str, what: str, error: Exception) -> CheckpointError:
    text = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{where}: expected a config that transformers builds a {what} from, found one that fails "
        f"({type(error).__name__}: {text}); fetch the file again"
    )
