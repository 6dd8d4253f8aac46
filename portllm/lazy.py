"""Names that a package exports on first use, so that importing the package imports none of its modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exporter(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` (PEP 562) of `package`; `homes` maps each name to its module in the package."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; known: {', '.join(sorted(homes))}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get
