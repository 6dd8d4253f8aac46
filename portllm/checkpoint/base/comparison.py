"""What a release changed against the one before: vocabulary, configuration, dtypes, shapes; from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.files.reading import read_json_object
from portllm.checkpoint.files.tensors import times
from portllm.errors import CheckpointError

TOKENIZER = "tokenizer.json"
EXAMPLES = 10
# keys that depend on who saved the file, not on the model
IDLE_KEYS = frozenset({"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype"})


def changes(old: Path, new: Path) -> dict[str, Any]:
    """Return what differs in `new`, each entry only where something does.

    vocab_size and dtype: [old, new]; tokens: how many were added, removed and renumbered, with examples; config: key →
    [old, new]; shapes: tensor → "old → new"; tensors: names added and removed. Raises CheckpointError.
    """
    before, after = Checkpoint.open(old), Checkpoint.open(new)
    pairs = {
        "vocab_size": (before.config.get("vocab_size"), after.config.get("vocab_size")),
        "dtype": (_dtype(before), _dtype(after)),
    }
    found: dict[str, Any] = {name: list(pair) for name, pair in pairs.items() if pair[0] != pair[1]}
    both = set(before.tensors) & set(after.tensors)
    parts = {
        "tokens": _tokens(old, new),
        "config": _config(before.config, after.config),
        "shapes": {
            name: f"{times(before.tensors[name].shape)} → {times(after.tensors[name].shape)}"
            for name in sorted(both)
            if before.tensors[name].shape != after.tensors[name].shape
        },
        "tensors": _names(set(before.tensors), set(after.tensors)),
    }
    return found | {name: part for name, part in parts.items() if part}


def summary(found: Mapping[str, Any]) -> str:
    """Return the changes in one line for people."""
    parts = []
    if "vocab_size" in found:
        parts.append("vocabulary {} → {}".format(*found["vocab_size"]))
    tokens = found.get("tokens", {})
    parts += [f"{tokens[kind]} tokens {kind}" for kind in ("added", "removed", "renumbered") if tokens.get(kind)]
    if "dtype" in found:
        parts.append("dtype {} → {}".format(*found["dtype"]))
    if shapes := found.get("shapes"):
        parts.append(f"{len(shapes)} shapes changed")
    if names := found.get("tensors"):
        parts.append(", ".join(f"{len(of_kind)} tensors {kind}" for kind, of_kind in names.items()))
    if config := found.get("config"):
        parts.append(f"config: {', '.join(config)}")
    return "; ".join(parts) or "the same shapes, vocabulary and configuration"


def _dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most bytes, as safetensors spells it."""
    counts: Counter[str] = Counter()
    for shard in checkpoint.shards:
        for entry in shard.tensors.values():
            counts[entry.dtype] += entry.nbytes
    return counts.most_common(1)[0][0] if counts else "none"


def _config(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = sorted((set(old) | set(new)) - IDLE_KEYS - {"vocab_size"})
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


def _names(old: set[str], new: set[str]) -> dict[str, list[str]]:
    parts = {"added": sorted(new - old), "removed": sorted(old - new)}
    return {kind: names for kind, names in parts.items() if names}


def _tokens(old: Path, new: Path) -> dict[str, Any]:
    before, after = _vocabulary(old), _vocabulary(new)
    if before is None or after is None:
        return {}
    added, removed = after.keys() - before.keys(), before.keys() - after.keys()
    renumbered = [token for token in before.keys() & after.keys() if before[token] != after[token]]
    if not (added or removed or renumbered):
        return {}
    examples = sorted(added, key=lambda token: after[token])[:EXAMPLES]
    return {"added": len(added), "removed": len(removed), "renumbered": len(renumbered), "examples": examples}


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token → id of a tokenizer.json, None where there is none. Raises CheckpointError."""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    tree = read_json_object(path)
    model = tree.get("model")
    vocabulary = model.get("vocab", {}) if isinstance(model, dict) else {}
    try:
        # unigram models list [token, score]
        tokens = dict(vocabulary) if isinstance(vocabulary, dict) else {t: i for i, (t, *_) in enumerate(vocabulary)}
        return tokens | {str(one["content"]): int(one["id"]) for one in tree.get("added_tokens") or ()}
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a tokenizer's file ({error}); fetch it again") from error
