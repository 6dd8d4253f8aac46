"""A base made again what it was before an adapter was put on it.

PEFT's `unload` leaves trained copies of whole modules (modules_to_save) in the base's place; and where an adapter
trains biases, or was initialised from the weights, loading it has written into the base itself. So the base's modules
are put back one by one, and its parameters are looked at: are they the same ones, unwritten?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module

# object, memory, and torch's count of the writes to it
Mark = tuple[int, int, int]


@dataclass(frozen=True)
class State:
    """A model's modules and parameters, by name, as they were."""

    modules: dict[str, Module]
    parameters: dict[str, Mark]

    @classmethod
    def of(cls, model: Any) -> State:
        """The state of `model` now."""
        return cls(dict(model.named_modules()), _marks(model))

    def restore(self, model: Any, adapted: Any) -> bool:
        """Take what PEFT put on `model` off again; False where its weights may have been changed, so load it anew."""
        tuner: Any = adapted.base_model
        plain = all(_plain(config) for config in adapted.peft_config.values())
        if hasattr(tuner, "unload"):
            tuner.unload()
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            if child and self.modules[parent]._modules.get(child) is not module:
                self.modules[parent]._modules[child] = module
        return plain and dict(model.named_modules()) == self.modules and _marks(model) == self.parameters


def _plain(config: Any) -> bool:
    """Whether PEFT leaves the base's weights alone when it loads an adapter with this configuration."""
    untouched = getattr(config, "bias", "none") == "none"
    return untouched and getattr(config, "init_lora_weights", True) in (True, False, "gaussian")


def _marks(model: Any) -> dict[str, Mark]:
    return {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters(remove_duplicate=False)}
