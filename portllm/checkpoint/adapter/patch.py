"""A patch: a PEFT directory of the LoRA family, read from its headers; unsupported features are refused by name.

LoRA: arXiv:2106.09685; rank-stabilised LoRA: arXiv:2312.03732; DoRA: arXiv:2402.09353; PiSSA: arXiv:2404.02948; OLoRA:
arXiv:2406.01775.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portllm.checkpoint.adapter.classification import sort_out
from portllm.checkpoint.adapter.config import Init, init_of, read_config
from portllm.checkpoint.adapter.factors import LoraPair, TokenRows
from portllm.checkpoint.adapter.targeting import scaling as scaling
from portllm.checkpoint.files.headers import Header, read_header
from portllm.checkpoint.files.names import ADAPTER_CONFIG as CONFIG
from portllm.checkpoint.files.names import ADAPTER_WEIGHTS as WEIGHTS
from portllm.checkpoint.files.names import PICKLE_SUFFIXES
from portllm.checkpoint.files.reading import kind_of, reading
from portllm.checkpoint.files.tensors import TensorEntry
from portllm.checkpoint.record.records import PatchRecord
from portllm.errors import PatchError, UnsafeFileError


@dataclass(frozen=True)
class Patch:
    """A PEFT LoRA directory. Names are those of the model in memory it was trained on, without PEFT's own parts.

    modules: LoRA on linear modules and embeddings, by module.
    stacks: LoRA on parameters (target_parameters), by the module that contains them, outermost wrapper first;
    targeting.stack_pairs returns the parameter of each, with its rank and scaling.
    replaced: parameters that replace the base's (modules_to_save, trained biases), by full name.
    tokens: rows that replace the base's (trainable_token_indices), by module.
    saved: copies of the base's weights that PEFT also wrote, by module; no part of the patch, and
    `planning.check_saved` proves that they are copies. idle: tensors without effect on the patched model, by name.
    follows_tie: modules (or ends of their names) that PEFT changes only where the base ties them to its embedding: by
    LoRA or complete weights (ensure_weight_tying), or by the embedding's trained rows.
    init: the initialisation, which determines what was subtracted from the old base.
    """

    path: Path
    config: Mapping[str, Any]
    header: Header
    modules: Mapping[str, LoraPair]
    saved: Mapping[str, TensorEntry]
    record: PatchRecord | None
    stacks: Mapping[str, tuple[LoraPair, ...]] = field(default_factory=dict)
    replaced: Mapping[str, TensorEntry] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    init: Init = "plain"
    idle: Mapping[str, TensorEntry] = field(default_factory=dict)
    follows_tie: frozenset[str] = frozenset()

    @classmethod
    def open(cls, path: Path) -> Patch:
        """Read config and header, and classify every tensor or refuse it by name; read no tensor data.

        Raises PatchError, UnsupportedPatchError, UnmatchedModulesError, ShapeError, UnsafeFileError or CheckpointError.
        """
        with reading(path):
            if not path.is_dir():
                raise PatchError(f"{path}: expected a PEFT directory, found {kind_of(path)}; check the path")
        config = read_config(path)
        header = read_header(_weights(path))
        contents = sort_out(config, header)
        record = PatchRecord.find(path)
        return cls(
            path, config, header, contents.modules, contents.saved, record,
            contents.stacks, contents.replaced, contents.tokens,
            init_of(config, path / CONFIG), contents.idle, frozenset(contents.follows_tie),
        )  # fmt: skip

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the config states that the base stores its weights transposed (GPT-2's Conv1D)."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def ensure_weight_tying(self) -> bool:
        """Whether the base's tied weights stayed tied in training."""
        return bool(self.config.get("ensure_weight_tying"))

    @property
    def left_behind(self) -> frozenset[str]:
        """Names of tensors of its old base; in a patch for another base they would replace that base's."""
        return frozenset(entry.name for entry in (*self.saved.values(), *self.idle.values()))

    @property
    def beyond(self) -> str | None:
        """The first feature that is not Δ = s·BA added to modules, for people; None for plain LoRA."""
        pairs = self.modules.values()
        features = {
            "DoRA": any(pair.magnitude for pair in pairs),
            "lora_bias": any(pair.bias for pair in pairs),
            "target_parameters": self.stacks,
            "modules or biases saved completely": self.replaced,
            "trained tokens": self.tokens,
            f"init_lora_weights={self.init}": self.init != "plain",
        }
        return next((feature for feature, present in features.items() if present), None)


def _weights(path: Path) -> Path:
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if not pickles:
        raise PatchError(f"{path}: has no {WEIGHTS}; expected a directory written by PEFT's save_pretrained")
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "tensors = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); "
        "save_file({k: v.contiguous() for k, v in tensors.items()}, sys.argv[2])"
    )
    command = shlex.join(["python", "-c", code, str(path / pickles[0]), str(path / WEIGHTS)])
    raise UnsafeFileError(f"{path / pickles[0]}: is a pickle file, expected {WEIGHTS}; convert it with: {command}")
