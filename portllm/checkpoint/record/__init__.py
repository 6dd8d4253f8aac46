"""Records that make a directory complete, and the texts made from them.

    records.py      patch.json, port.json, release.json, dataset.json
    provenance.py   names without machine paths, package versions, digests
    card.py         model cards
    serving.py      whether vLLM accepts an adapter

Public names, imported on first use: `DatasetRecord`, `PatchRecord`, `PortRecord`, `ReleaseRecord`, `Source`,
`patch_card`, `port_card`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm import lazy

if TYPE_CHECKING:
    from portllm.checkpoint.record.card import patch_card as patch_card
    from portllm.checkpoint.record.card import port_card as port_card
    from portllm.checkpoint.record.records import DatasetRecord as DatasetRecord
    from portllm.checkpoint.record.records import PatchRecord as PatchRecord
    from portllm.checkpoint.record.records import PortRecord as PortRecord
    from portllm.checkpoint.record.records import ReleaseRecord as ReleaseRecord
    from portllm.checkpoint.record.records import Source as Source

_HOMES = {
    "DatasetRecord": "records",
    "PatchRecord": "records",
    "PortRecord": "records",
    "ReleaseRecord": "records",
    "Source": "records",
    "patch_card": "card",
    "port_card": "card",
}
__getattr__ = lazy.exporter(__name__, _HOMES)
