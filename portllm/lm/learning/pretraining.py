"""The making of a release: a base pretrained from scratch, or the release before pretrained further."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.copying import copy_companions
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.files.tensors import ARRAY_DTYPES, TORCH_DTYPES
from portllm.checkpoint.planning.planner import make_plan
from portllm.checkpoint.writing.ported import write_merged
from portllm.errors import ParamsError
from portllm.lm.data.encoding import pack, read_texts
from portllm.lm.data.tables import read_rows
from portllm.lm.learning import loading, training
from portllm.lm.learning.snapshots import training_key
from portllm.lm.names.layout import open_base
from portllm.lm.quiet import quieten
from portllm.params import EvolveParams, FetchParams, OptimParams, as_tree

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAIN = "train.parquet"
PROBE = "probe.parquet"
PROBE_BATCH = 64


@dataclass(frozen=True)
class TrainingCallbacks:
    """What is called as a training goes (see `training.fit`), and the folder of its snapshots."""

    on_metrics: training.OnMetrics | None = None
    on_progress: training.OnProgress | None = None
    on_note: Callable[[str], object] = lambda _: None
    on_cost: Callable[[Mapping[str, float]], object] = lambda _: None
    checkpoints: Path | None = None

    def with_checkpoints(self, checkpoints: Path | None) -> TrainingCallbacks:
        """Return the same callbacks with snapshots in `checkpoints`."""
        return dataclasses.replace(self, checkpoints=checkpoints)


@dataclass(frozen=True)
class Release:
    """A trained model in memory, to be saved as a checkpoint and probed.

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
        Raises ParamsError for a weight beyond that dtype's range.
        """
        if not processes.is_main():
            return
        if self.base is None:
            self.model.save_pretrained(folder, state_dict=self.weights)
            self.tokenizer.save_pretrained(folder)
        elif hasattr(self.model, "peft_config"):
            self._merge(self.base, folder)
        else:
            _in_dtypes_of_base(self.model, self.weights, self.base).save_pretrained(folder)
            copy_companions(self.base, folder)

    def fingerprint(self, folder: Path) -> str:
        """Return the fingerprint of what the main process saved in `folder`; the others return an empty one."""
        return fingerprint(folder) if processes.is_main() else ""

    def probe(self, corpus: Path) -> dict[str, float]:
        """Return the base probe: per task, the share (0..1) of the prompts in `corpus` continued with the answer."""
        path = corpus / PROBE
        rows = read_rows(path, ("task", "prompt", "answer")) if path.is_file() and self.weights is None else []
        tasks = dict.fromkeys(row["task"] for row in rows)
        pairs = {task: [(r["prompt"], r["answer"]) for r in rows if r["task"] == task] for task in tasks}
        return {task: share_answered(self.model, self.tokenizer, own) for task, own in pairs.items()}

    def _merge(self, base: Path, folder: Path) -> None:
        """Add the LoRA to the base on disk as a port adds a patch: exact sums, whatever precision was trained in."""
        with tempfile.TemporaryDirectory() as place:
            self.model.save_pretrained(place, state_dict=self.weights)
            lora, old = Patch.open(Path(place)), open_base(base)
            write_merged(folder, lora, old, make_plan(lora, old))


def own_tokenizer(corpus: Path, params: FetchParams) -> PreTrainedTokenizerBase:
    """Return a byte-pair tokenizer learnt from the texts of `corpus`. Raises DataError and ParamsError."""
    from portllm.lm.learning.words import byte_pairs

    longest = params.architecture.max_positions or params.block_length
    return byte_pairs(read_texts(corpus / TRAIN), params.vocab_size, longest)


def from_scratch(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, params: FetchParams, callbacks: TrainingCallbacks | None = None
) -> Release:
    """Pretrain a small Llama on the texts of `corpus`. Raises DataError, ParamsError and MachineError."""
    from portllm.lm.learning.llama import new_llama

    quieten()
    model = new_llama(tokenizer, params.architecture, params.seed)
    return _fit(model, tokenizer, corpus, params, callbacks or TrainingCallbacks())


def continued(base: Path, corpus: Path, params: EvolveParams, callbacks: TrainingCallbacks | None = None) -> Release:
    """Pretrain `base` further on the texts of `corpus`: all weights, or a LoRA that `save` merges.

    Raises DataError, CheckpointError, ParamsError and MachineError.
    """
    quieten()
    tokenizer = loading.tokenizer_of(base)
    if params.mode == "full":
        model: Any = loading.trainable_base(base, params.optim)
    else:
        model = loading.add_lora(loading.frozen_base(base, params.optim), params.lora, params.seed)
    return _fit(model, tokenizer, corpus, params, callbacks or TrainingCallbacks(), base)


def key(base: Path | None, data: Mapping[str, str], params: FetchParams | EvolveParams) -> str | None:
    """Return what identifies a training that the next run resumes after a kill; None where it writes no snapshots."""
    if not params.optim.save_steps:
        return None
    return training_key(base, dict(data), as_tree(params))


def share_answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> float:
    """Return the share (0..1) of (prompt, answer) pairs whose answer is the model's greedy continuation; 0 for none.

    Every token of the answer must be the likeliest, given the prompt and the answer so far. The model stays in its mode
    (training or not).
    """
    import torch

    was_training = model.training
    model.eval()
    right = 0
    try:
        with torch.inference_mode():
            for start in range(0, len(pairs), PROBE_BATCH):
                right += _answered(model, tokenizer, pairs[start : start + PROBE_BATCH])
    finally:
        model.train(was_training)
    return right / len(pairs) if pairs else 0.0


def _answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> int:
    import torch

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = [ids(prompt) for prompt, _ in pairs]
    texts = [ids(f"{prompt} {answer.lstrip()}") for prompt, answer in pairs]
    longest = max(map(len, texts))
    # padding stands after the text, where causal attention does not look: no mask is needed
    padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=model.device)
    likeliest = model(input_ids=padded).logits.argmax(-1)
    return sum(
        likeliest[row, len(prompt) - 1 : len(text) - 1].tolist() == text[len(prompt) :]
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    )


def _fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    params: FetchParams | EvolveParams,
    callbacks: TrainingCallbacks,
    base: Path | None = None,
) -> Release:
    blocks = pack(tokenizer, read_texts(corpus / TRAIN), params.block_length)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)  # once sharded, a process has its share
    fitted = training.fit(
        model, tokenizer, blocks, optim=params.optim, seed=params.seed, checkpoints=callbacks.checkpoints,
        on_metrics=callbacks.on_metrics, on_progress=callbacks.on_progress, on_note=callbacks.on_note,
    )  # fmt: skip
    callbacks.on_cost(fitted.cost)
    metrics = {
        "loss": fitted.loss,
        "documents": blocks.documents,
        "blocks": len(blocks),
        "tokens_dropped": blocks.dropped,
        "trainable_parameters": trainable,
    }
    return Release(model, tokenizer, metrics, base, fitted.weights)


def _in_dtypes_of_base(model: PreTrainedModel, weights: Mapping[str, Tensor] | None, base: Path) -> PreTrainedModel:
    """Return the trained model, every parameter in the dtype it has on the base's disk. Raises ParamsError."""
    import torch

    if weights is not None:
        model = loading.trainable_base(base, OptimParams())
        model.load_state_dict(dict(weights), strict=False)  # tied weights go by one of their names
    checkpoint = Checkpoint.open(base)
    dtypes = {
        name: getattr(torch, TORCH_DTYPES[checkpoint.tensors[name].dtype])
        for name in checkpoint.names
        if checkpoint.tensors[name].dtype in ARRAY_DTYPES  # of floating point
    }
    commonest = max(dtypes.values(), key=list(dtypes.values()).count, default=torch.float32)
    for name, parameter in model.named_parameters():
        # a name that transformers changes when it loads: the commonest dtype
        parameter.data = parameter.data.to(dtypes.get(name, commonest))
        if not parameter.data.isfinite().all():
            raise ParamsError(
                f"{name}: expected a weight in the range of the base's dtype {parameter.dtype}, found one beyond it; "
                "lower optim.learning_rate"
            )
    return model
