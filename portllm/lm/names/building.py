"""The model a checkpoint's config names, built without weights on torch's meta device: quick at any size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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

# far past any model there is; a config that asks for more would build for ever
COUNTS = ("layer", "layers", "labels")
MAX_COUNT = 30_000
MAX_PARAMETERS = 200_000


def meta_model(base: Checkpoint, task_type: str | None = None, num_labels: int | None = None) -> PreTrainedModel:
    """The model of `base` on the meta device, weights not tied; no code but transformers' own runs.

    `task_type` is PEFT's: a base of another kind gets that kind's head, with `num_labels` where it has labels. Raises
    CheckpointError when config.json does not describe a model transformers knows.
    """
    _refuse_endless(base, base.config)
    quieten()
    config = _config(base)
    model_class = _model_class(base, config, task_type)
    try:
        config = _own_config(model_class, config) or config
        if num_labels is not None:
            config.num_labels = num_labels
        with _meta(model_class):
            return model_class(config)
    except Exception as error:
        raise _unbuildable(base, model_class.__name__, error) from error


def _config(base: Checkpoint) -> PreTrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = base.config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if base.config.get("auto_map"):
            raise CheckpointError(
                f"{base.path / 'config.json'}: model_type {kind!r} needs code of its own (auto_map), expected one that "
                "transformers has built in; portllm runs no code from a checkpoint"
            )
        raise CheckpointError(
            f"{base.path / 'config.json'}: expected a model_type that transformers knows, found {kind!r}; "
            "is transformers recent enough for this model?"
        )
    try:
        with _silence():
            return CONFIG_MAPPING[kind].from_json_file(base.path / "config.json")
    except Exception as error:
        raise _unbuildable(base, f"{kind} config", error) from error


def _model_class(base: Checkpoint, config: PreTrainedConfig, task_type: str | None) -> type[PreTrainedModel]:
    """The class config.json names, unless `task_type` asks for another head; else the first family that has one."""
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
            if found := _class(name):
                return found
    asked = task_type or "language model"
    raise CheckpointError(
        f"{base.path / 'config.json'}: expected a model_type with a {asked} class in transformers, found "
        f"{config.model_type!r}; is this the base of this patch?"
    )


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """architectures[0], where transformers has it and it is made for this config."""
    names = config.architectures or []
    found = _class(names[0]) if isinstance(names, list) and names else None
    return found if found is not None and _own_config(found, config) is not None else None


def _own_config(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config a class is made for: this one, or the text part of this one; None where it is neither."""
    made_for = model_class.config_class or ()
    return next((own for own in (config, config.get_text_config()) if isinstance(own, made_for)), None)


def _names(tables: Any, table: str, config: PreTrainedConfig) -> tuple[str, ...]:
    """Names of the classes a table of transformers' has for this model type."""
    names = getattr(tables, table).get(config.model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _class(name: object) -> type[PreTrainedModel] | None:
    """A model class of transformers by name; imports that model's file only."""
    import transformers

    if not isinstance(name, str) or not name.isidentifier():
        return None
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


@contextmanager
def _meta(model_class: type[PreTrainedModel]) -> Iterator[None]:
    """Where from_pretrained builds: the meta device, weights not tied; nothing said, and an end to parameters."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def limit(_module: nn.Module, name: str, _parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > MAX_PARAMETERS:
            raise ValueError(f"more than {MAX_PARAMETERS} parameters, at {name}")

    with ExitStack() as stack:
        stack.enter_context(_silence())
        for context in model_class.get_init_context(torch.float32, False, False, None):
            stack.enter_context(context)
        handle = register_module_parameter_registration_hook(limit)
        stack.callback(handle.remove)
        yield


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refuse_endless(base: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a number of layers or labels no model has: config classes make lists of that length."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_endless(base, value)
        elif isinstance(value, int) and key.endswith(COUNTS) and value > (most := _most(key, base)):
            raise CheckpointError(
                f"{base.path / 'config.json'}: expected {key} of at most {most}, found {value}; fetch the file again"
            )


def _most(key: str, base: Checkpoint) -> int:
    """How many of something a config may ask for; no model has more layers than tensors."""
    return MAX_COUNT if key.endswith("labels") else min(MAX_COUNT, max(1_000, len(base.tensors)))


def _unbuildable(base: Checkpoint, what: str, error: Exception) -> CheckpointError:
    text = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{base.path / 'config.json'}: expected a config that transformers builds a {what} from, found one that fails "
        f"({type(error).__name__}: {text}); fetch the file again"
    )
