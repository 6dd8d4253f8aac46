"""A release's making: pretraining from scratch, or continued pretraining of the release before."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.checkpoint import ARRAY_DTYPES, TORCH_DTYPES, Checkpoint
from portllm.checkpoint.files.copying import copy_companions
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.planning.planner import make_plan
from portllm.checkpoint.writing.ported import write_merged
from portllm.lm.data.encoding import pack, read_texts
from portllm.lm.data.tables import read_rows
from portllm.lm.learning import loading, probe, training
from portllm.lm.learning.snapshots import training_key
from portllm.lm.names.naming import layout_of
from portllm.lm.quiet import quieten
from portllm.params import EvolveParams, FetchParams, OptimParams, as_tree

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnMetrics = training.OnMetrics
OnProgress = training.OnProgress

TRAIN = "train.parquet"
PROBE = "probe.parquet"


@dataclass(frozen=True)
class Watch:
    """Who hears of a training as it goes, and where its snapshots are (see `training.fit`)."""

    on_metrics: OnMetrics | None = None
    on_progress: OnProgress | None = None
    on_note: Callable[[str], object] = lambda _: None
    on_cost: Callable[[Mapping[str, float]], object] = lambda _: None
    checkpoints: Path | None = None

    def keeping(self, checkpoints: Path | None) -> Watch:
        """The same, with its snapshots in `checkpoints`."""
        return dataclasses.replace(self, checkpoints=checkpoints)


@dataclass(frozen=True)
class Release:
    """A model just made, in memory: saved as a checkpoint, asked what it knows.

    `base` is what it was trained from, None from scratch; `weights` holds what was trained where the model itself is
    sharded over processes.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    metrics: Mapping[str, float]
    base: Path | None = None
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face checkpoint: config, safetensors, tokenizer.

        What was not trained stays as it is in the base, byte for byte; weights keep the base's dtype, rounded once.
        """
        if not processes.is_main():
            return
        if self.base is None:
            self.model.save_pretrained(folder, state_dict=self.weights)
            self.tokenizer.save_pretrained(folder)
        elif hasattr(self.model, "peft_config"):
            self._merge(self.base, folder)
        else:
            _saved(self.model, self.weights, self.base).save_pretrained(folder)
            copy_companions(self.base, folder)

    def fingerprint(self, folder: Path) -> str:
        """Of what was saved in `folder`: by the main process, the others know none."""
        return fingerprint(folder) if processes.is_main() else ""

    def known(self, corpus: Path) -> dict[str, float]:
        """The base probe per task: share (0..1) of the prompts in `corpus` the model continues rightly."""
        path = corpus / PROBE
        rows = read_rows(path, ("task", "prompt", "answer")) if path.is_file() and self.weights is None else []
        tasks = dict.fromkeys(row["task"] for row in rows)
        pairs = {task: [(r["prompt"], r["answer"]) for r in rows if r["task"] == task] for task in tasks}
        return {task: probe.known(self.model, self.tokenizer, asked) for task, asked in pairs.items()}

    def _merge(self, base: Path, folder: Path) -> None:
        """The LoRA added to the base on disk as a port adds a patch: exact sums, whatever precision was trained in."""
        with tempfile.TemporaryDirectory() as place:
            self.model.save_pretrained(place, state_dict=self.weights)
            lora, checkpoint = Patch.open(Path(place)), Checkpoint.open(base)
            write_merged(folder, lora, checkpoint, make_plan(lora, checkpoint, layout_of(checkpoint)))


def own_tokenizer(corpus: Path, params: FetchParams) -> PreTrainedTokenizerBase:
    """A byte-pair tokenizer learnt from the texts of `corpus`. Raises DataError and ParamsError."""
    from portllm.lm.learning.words import byte_pairs

    longest = params.architecture.max_positions or params.block_length
    return byte_pairs(read_texts(corpus / TRAIN), params.vocab_size, longest)


def from_scratch(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, params: FetchParams, watch: Watch | None = None
) -> Release:
    """A small Llama pretrained on the texts of `corpus`. Raises DataError, ParamsError and MachineError."""
    from portllm.lm.learning.llama import new_llama

    quieten()
    model = new_llama(tokenizer, params.architecture, params.seed)
    return _fit(model, tokenizer, corpus, params, watch or Watch())


def continued(base: Path, corpus: Path, params: EvolveParams, watch: Watch | None = None) -> Release:
    """`base` pretrained further on the texts of `corpus`: all weights, or a LoRA that `save` merges.

    Raises DataError, CheckpointError, ParamsError and MachineError.
    """
    quieten()
    tokenizer = loading.tokenizer_of(base)
    if params.mode == "full":
        model: Any = loading.trainable_base(base, params.optim)
    else:
        model = loading.add_lora(loading.frozen_base(base, params.optim), params.lora, params.seed)
    return _fit(model, tokenizer, corpus, params, watch or Watch(), base)


def key(base: Path | None, data: Mapping[str, str], params: FetchParams | EvolveParams) -> str | None:
    """What names a training that is to be gone on with after a kill; None where no snapshots are asked for."""
    if not params.optim.save_steps:
        return None
    return training_key(base, dict(data), as_tree(params))


def _fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    params: FetchParams | EvolveParams,
    watch: Watch,
    base: Path | None = None,
) -> Release:
    blocks = pack(tokenizer, read_texts(corpus / TRAIN), params.block_length)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)  # once sharded, a process sees its share
    fitted = training.fit(
        model, tokenizer, blocks, optim=params.optim, seed=params.seed, checkpoints=watch.checkpoints,
        on_metrics=watch.on_metrics, on_progress=watch.on_progress, on_note=watch.on_note,
    )  # fmt: skip
    watch.on_cost(fitted.cost)
    metrics = {
        **training.last_loss(fitted.history),
        "documents": blocks.documents,
        "blocks": len(blocks),
        "tokens_dropped": blocks.dropped,
        "trainable_parameters": trainable,
    }
    return Release(model, tokenizer, metrics, base, fitted.weights)


def _saved(model: PreTrainedModel, weights: Mapping[str, Tensor] | None, base: Path) -> PreTrainedModel:
    """The trained model, whole, every parameter in the dtype it has on the base's disk."""
    import torch

    if weights is not None:
        model = loading.trainable_base(base, OptimParams())
        model.load_state_dict(dict(weights), strict=False)  # tied weights go by one of their names
    checkpoint = Checkpoint.open(base)
    kinds = {
        name: getattr(torch, TORCH_DTYPES[checkpoint.dtype(name)])
        for name in checkpoint.names
        if checkpoint.dtype(name) in ARRAY_DTYPES  # of floating point
    }
    most = max(kinds.values(), key=list(kinds.values()).count, default=torch.float32)
    for name, parameter in model.named_parameters():
        # a name that transformers changes when it loads: the dtype of most
        parameter.data = parameter.data.to(kinds.get(name, most))
    return model
