"""A PEFT directory of the LoRA family, read from its headers.

    config.py           adapter_config.json, checked; unsupported features refused by name
    patterns.py         regular expressions of the config, with a time limit
    targeting.py        the modules that get LoRA from PEFT, with rank and scaling
    factors.py          LoraPair, TokenRows: the tensors of one module
    classification.py   every tensor of the file by its kind
    patch.py            Patch: the complete directory

Public names, imported on first use: `LoraPair`, `Patch`, `TokenRows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm import lazy

if TYPE_CHECKING:
    from portllm.checkpoint.adapter.factors import LoraPair as LoraPair
    from portllm.checkpoint.adapter.factors import TokenRows as TokenRows
    from portllm.checkpoint.adapter.patch import Patch as Patch

_HOMES = {
    "LoraPair": "factors",
    "Patch": "patch",
    "TokenRows": "factors",
}
__getattr__ = lazy.exporter(__name__, _HOMES)
