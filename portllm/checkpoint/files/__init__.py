"""Files on disk: safetensors headers and tensors, digests, complete output, links, names.

    names.py      file names of weights, configs and records; the files that a ported directory gets besides weights
    reading.py    input files opened by kind, read completely; strict JSON
    tensors.py    TensorEntry: a tensor in a file, and its values
    headers.py    Header: the tensors of a safetensors file; the shards of a directory
    hashing.py    digests of tensors and files, fingerprints, and their cache
    progress.py   bytes done of bytes in all, over several threads
    copying.py    one file copied: blocks shared, by the kernel, or through memory
    links.py      which symbolic links are followed
    output.py     a directory or file that appears complete or not at all

Public names, imported on first use: `ByteMeter`, `Header`, `Progress`, `TensorEntry`, `file_digest`, `fingerprint`,
`read_header`, `read_headers`, `staged`, `staged_file`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm import lazy

if TYPE_CHECKING:
    from portllm.checkpoint.files.hashing import file_digest as file_digest
    from portllm.checkpoint.files.hashing import fingerprint as fingerprint
    from portllm.checkpoint.files.headers import Header as Header
    from portllm.checkpoint.files.headers import read_header as read_header
    from portllm.checkpoint.files.headers import read_headers as read_headers
    from portllm.checkpoint.files.output import staged as staged
    from portllm.checkpoint.files.output import staged_file as staged_file
    from portllm.checkpoint.files.progress import ByteMeter as ByteMeter
    from portllm.checkpoint.files.progress import Progress as Progress
    from portllm.checkpoint.files.tensors import TensorEntry as TensorEntry

_HOMES = {
    "ByteMeter": "progress",
    "Header": "headers",
    "Progress": "progress",
    "TensorEntry": "tensors",
    "file_digest": "hashing",
    "fingerprint": "hashing",
    "read_header": "headers",
    "read_headers": "headers",
    "staged": "output",
    "staged_file": "output",
}
__getattr__ = lazy.exporter(__name__, _HOMES)
