"""A plan carried out, in one pass over the bytes.

    targets.py    the files to write, tensor by tensor
    segments.py   a file's segments: copied bytes, computed rows
    stream.py     segments on their way to the disk
    writer.py     all files of a port, in parallel
    ported.py     write_merged: base and patch in one checkpoint
    adapter.py    write_port: either; write_adapter: the patch, re-targeted

Public names, imported on first use: `Ported`, `Target`, `TargetFile`, `target_files`, `write_adapter`, `write_merged`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm import lazy

if TYPE_CHECKING:
    from portllm.checkpoint.writing.adapter import write_adapter as write_adapter
    from portllm.checkpoint.writing.ported import Ported as Ported
    from portllm.checkpoint.writing.ported import write_merged as write_merged
    from portllm.checkpoint.writing.targets import Target as Target
    from portllm.checkpoint.writing.targets import TargetFile as TargetFile
    from portllm.checkpoint.writing.targets import target_files as target_files

_HOMES = {
    "Ported": "ported",
    "Target": "targets",
    "TargetFile": "targets",
    "target_files": "targets",
    "write_adapter": "adapter",
    "write_merged": "ported",
}
__getattr__ = lazy.exporter(__name__, _HOMES)
