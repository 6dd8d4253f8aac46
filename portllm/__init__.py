"""portllm: move a LoRA patch to the next release of its base model, without training.

Every verb of the command line is here too, imported when it is first called:

    import portllm
    record = portllm.port("my-patch", onto="new-base", out="ported")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from portllm.api import evaluate, fingerprint, port, verify

__all__ = ["__version__", "evaluate", "fingerprint", "port", "verify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("portllm.api"), name)
    raise AttributeError(f"module 'portllm' has no attribute {name!r}; known: {', '.join(__all__)}")
