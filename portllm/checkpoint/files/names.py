"""Names of files: of weights, configs and records, and the files that a port copies in addition to the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from portllm.checkpoint.files.reading import reading
from portllm.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# weights in any format: a copied one would contain unmerged weights next to the ported ones
WEIGHT_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".npz", ".pkl",
})  # fmt: skip
RECORDS = frozenset({"README.md", "port.json", "patch.json", "release.json"})
VOCABULARY = frozenset({
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
})  # fmt: skip
TEMPLATES = frozenset({"chat_template.jinja", "chat_template.json"})
TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER = VOCABULARY | TEMPLATES | {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


def companions(base: Path, patch: Path) -> dict[str, Path]:
    """Return relative name → file to copy into a ported checkpoint: the base's files and the patch's tokenizer.

    A patch with a vocabulary supplies its complete tokenizer, so that two tokenizers are never mixed. A patch with only
    a chat template supplies only that. Raises CheckpointError where a file is a link to nothing or not a file.
    """
    files = dict(_others(base))
    tokenizer = tokenizer_files(patch)
    if VOCABULARY & tokenizer.keys():
        files = {name: path for name, path in files.items() if not _of_tokenizer(name)}
        files.update(tokenizer)
    elif templates := {name: path for name, path in tokenizer.items() if _of_template(name)}:
        files = {name: path for name, path in files.items() if not _of_template(name)}
        files.update(templates)
    return {name: _file(path) for name, path in sorted(files.items())}


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return relative name → path of the tokenizer files and chat templates in `folder`. Raises CheckpointError."""
    return {name: _file(path) for name, path in _others(folder) if _of_tokenizer(name)}


def _others(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative name, path) of all files but weights, records and hidden files. Raises CheckpointError."""

    def refuse(error: OSError) -> None:
        raise error

    with reading(folder):
        for where, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and not (Path(where) / f).is_symlink())
            for name in sorted(names):
                path = Path(where) / name
                relative = path.relative_to(folder).as_posix()
                if not name.startswith(".") and not _is_weight(name) and relative not in RECORDS:
                    _refuse_half_characters(relative, folder)
                    yield relative, path


def _refuse_half_characters(name: str, folder: Path) -> None:
    """Raise CheckpointError for a name that is not UTF-8: a record could not contain it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        escaped = name.encode("utf-8", "backslashreplace").decode()
        raise CheckpointError(f"{folder}: the name of its file {escaped} is not UTF-8; rename or remove it") from error


def _file(path: Path) -> Path:
    # a file that cannot be copied is an error, never left out: a model without its tokenizer is a wrong model
    if not path.is_file():
        kind = "a link to nothing" if path.is_symlink() and not path.exists() else "no file"
        raise CheckpointError(f"{path}: expected a file to copy, found {kind}; fetch it again or remove it")
    return path


def _is_weight(name: str) -> bool:
    return Path(name).suffix in WEIGHT_SUFFIXES or name.endswith(".index.json")


def _of_tokenizer(name: str) -> bool:
    return name in TOKENIZER or _of_template(name)


def _of_template(name: str) -> bool:
    return name in TEMPLATES or name.startswith(f"{TEMPLATE_FOLDER}/")
