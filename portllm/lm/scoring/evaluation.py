"""The LM Evaluation Harness over one loaded base and many patches.

The harness is driven through its own classes, so prompts, filters and metrics are the official ones. Adapters are put
on the one loaded base, which gives bit-identical results to loading each on its own, and taken off again.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import EvaluationError, MachineError
from portllm.lm.data import asking
from portllm.lm.opening import refusals
from portllm.lm.quiet import quieten
from portllm.lm.scoring import sharing
from portllm.lm.scoring.questions import asked_split
from portllm.lm.scoring.scored import ScoredTask, of_results
from portllm.params import EvaluateParams

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnAnswered = Callable[[float], None]  # the share of a task's requests that are answered
# a parameter's object, memory, and torch's count of the writes to it
Trace = tuple[int, int, int]


class Harness:
    """A loaded checkpoint and the harness that scores it; `score` scores the patch on it inside of `patched`."""

    def __init__(self, path: Path, params: EvaluateParams, *, trust_remote_code: bool = False) -> None:
        import torch

        quieten()
        if params.threads:
            torch.set_num_threads(params.threads)
        self._path, self._params, self._trust = path, params, trust_remote_code
        self._model: Any = None
        self._lm: Any = None
        self._load()

    def score(self, task: Any, *, on_answered: OnAnswered | None = None) -> ScoredTask:
        """Score a task (of `questions.load_tasks`), whatever was scored before. Raises EvaluationError."""
        from lm_eval.evaluator import evaluate

        _seed(self._params.seed)
        self._lm.on_answered, self._lm.truncated = on_answered, set()
        name = task.task_name
        tasks = {"tasks": {name: task}}
        limit = self._params.limit or None
        try:
            results = evaluate(self._lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
        except (ArithmeticError, AssertionError, KeyError, ValueError) as error:
            raise EvaluationError(
                f"{name}: the harness cannot score {self._path.name} ({asking.reason(error)})"
            ) from error
        except EvaluationError as error:
            raise EvaluationError(f"{name}: {error}") from error
        return of_results(name, results, split=asked_split(task), truncated=len(self._lm.truncated))

    @contextlib.contextmanager
    def patched(self, patch: Path) -> Iterator[None]:
        """Put the PEFT adapter in `patch` on the base until the block ends. Raises EvaluationError, MachineError."""
        before = State.of(self._model)
        adapted = self._adapted(patch)
        self._lm.active = adapted
        try:
            yield
        finally:
            self._lm.active = self._model
            if not before.restore(self._model, adapted):
                del before, adapted  # they hold the changed base, next to which another may not fit
                self._load()

    def _load(self) -> None:
        """Load the checkpoint, after the one before is freed."""
        self._model = self._lm = None
        gc.collect()
        from portllm.lm.scoring.language_model import BatchedLM

        self._model, self.tokenizer = load_model(self._path, trust_remote_code=self._trust)
        self._lm = BatchedLM(self._model, self.tokenizer, rows=self._params.batch_size)

    def _adapted(self, patch: Path) -> Any:
        import torch
        from peft import PeftModel

        try:
            return PeftModel.from_pretrained(self._model, str(patch), is_trainable=False).eval()
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"{patch}: does not fit into the GPU's memory next to {self._path.name}; use a larger GPU"
            ) from error
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{patch}: PEFT cannot put it on {self._path.name} ({_peft_reason(error)}); is it for this base?"
            ) from error


@dataclass(frozen=True)
class State:
    """A model's modules and parameters, by name, as they are before an adapter is put on it.

    PEFT's `unload` leaves trained copies of complete modules (modules_to_save) in the base's place; and where an
    adapter trains biases, or was initialised from the weights, loading it has written into the base itself. So the
    base's modules are put back one by one, and its parameters are compared: are they the same ones, unwritten?
    """

    modules: dict[str, Module]
    parameters: dict[str, Trace]

    @classmethod
    def of(cls, model: Any) -> State:
        """Return the state of `model` now."""
        return cls(dict(model.named_modules()), _traces(model))

    def restore(self, model: Any, adapted: Any) -> bool:
        """Take what PEFT put on `model` off; return False where its weights may be changed, and it must be reloaded."""
        tuner: Any = adapted.base_model
        plain = all(_leaves_base_alone(config) for config in adapted.peft_config.values())
        if hasattr(tuner, "unload"):
            tuner.unload()
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            if child and getattr(self.modules[parent], child, None) is not module:
                setattr(self.modules[parent], child, module)
        return plain and dict(model.named_modules()) == self.modules and _traces(model) == self.parameters


def load_model(path: Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the causal language model and tokenizer in `path`, on the GPU where there is one, in eval mode.

    The weights keep the dtype the checkpoint has. Raises EvaluationError when either cannot be loaded, MachineError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = sharing.device()
    direct = {"device_map": {"": device}} if device.type == "cuda" else {}  # never all of it in the machine's memory
    with refusals(path, EvaluationError, "transformers cannot load it ({}); is it a complete checkpoint?"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code, **direct
        )
    return (model if direct else model.to(device)).eval(), tokenizer


def _leaves_base_alone(config: Any) -> bool:
    """Return whether PEFT does not write into the base when it loads an adapter with this configuration."""
    untouched = getattr(config, "bias", "none") == "none"
    return untouched and getattr(config, "init_lora_weights", True) in (True, False, "gaussian")


def _traces(model: Any) -> dict[str, Trace]:
    return {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters(remove_duplicate=False)}


def _peft_reason(error: BaseException) -> str:
    """Return PEFT's reason in one line: of a list under a heading, the first item."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else asking.reason(error)


def _seed(seed: int) -> None:
    """Set the harness's own start of everything random, so that no result depends on what was scored before it."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
