"""The LM Evaluation Harness over one loaded base and many patches.

The harness is driven through its own classes, so prompts, filters and metrics are the official ones. Its requests are
made once and asked again of every patch; adapters are switched on the one loaded base, which gives bit-identical
results to loading each on its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import EvaluationError, MachineError
from portllm.lm.data import asking, stock
from portllm.lm.opening import refusals
from portllm.lm.quiet import quieten
from portllm.lm.scoring import restoring, sharing
from portllm.lm.scoring.scored import Scored, of_results
from portllm.lm.scoring.scorer import Scorer
from portllm.params import EvaluateParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnAnswered = Callable[[float], None]  # the share of a task's requests that are answered


class Harness:
    """A checkpoint, loaded, and the tasks it is asked; `score` asks the patch on it, inside of `patched`."""

    def __init__(self, path: Path, params: EvaluateParams, *, trust_remote_code: bool = False) -> None:
        import torch

        quieten()
        if params.threads:
            torch.set_num_threads(params.threads)
        self._path, self._params, self._trust = path, params, trust_remote_code
        self._model: Any
        self._model, self.tokenizer = load_model(path, trust_remote_code=trust_remote_code)
        self._scorer = Scorer(self._model, self.tokenizer, rows=params.batch_size)

    def score(self, task: Any, *, on_answered: OnAnswered | None = None) -> Scored:
        """A task (of `load_tasks`), scored as if nothing had been before. Raises EvaluationError."""
        from lm_eval.evaluator import evaluate

        _seed(self._params.seed)
        self._scorer.on_answered = on_answered
        name = task.task_name
        try:
            results = evaluate(
                self._scorer,
                {"tasks": {name: task}},
                limit=self._params.limit or None,
                bootstrap_iters=0,
                log_samples=True,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise EvaluationError(
                f"{name}: the harness cannot ask {self._path.name} ({asking.reason(error)})"
            ) from error
        return of_results(name, results, split=asked_split(task))

    @contextlib.contextmanager
    def patched(self, patch: Path) -> Iterator[None]:
        """The PEFT adapter in `patch` switched on, until the block ends. Raises EvaluationError, MachineError."""
        import torch
        from peft import PeftModel

        before = restoring.State.of(self._model)
        try:
            model = PeftModel.from_pretrained(self._model, str(patch), is_trainable=False).eval()
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"{patch}: does not fit into the GPU's memory beside {self._path.name}; use a larger GPU"
            ) from error
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            what = asking.reason(error)
            raise EvaluationError(
                f"{patch}: PEFT cannot put it on {self._path.name} ({what}); was it made for it?"
            ) from error
        self._scorer.use(model)
        try:
            yield
        finally:
            if not before.restore(self._model, model):
                del before, model  # they hold the spoilt base, beside which another may not fit
                self._reload()
            self._scorer.use(self._model)

    def _reload(self) -> None:
        self._model = None
        self._scorer.use(None)
        gc.collect()
        self._model, _ = load_model(self._path, trust_remote_code=self._trust)


def load_tasks(specs: Sequence[str | Mapping[str, Any]], params: EvaluateParams) -> dict[str, Any]:
    """Harness task objects by name, from whole task configurations or the harness's own names.

    Examples in the prompt are as many as the harness gives for the same `--num_fewshot`. Raises EvaluationError when a
    name is unknown or its data cannot be had.
    """
    loaded: dict[str, Any] = {}
    for spec in specs:
        name = spec if isinstance(spec, str) else str(spec["task"])
        config = stock.definition(spec) if isinstance(spec, str) else spec
        task = loaded[name] = asking.build(config, name=name)
        own = task.config.num_fewshot
        if own is None or (params.num_fewshot >= 0 and own != 0):  # a task that says 0 means it, the harness holds
            task.set_config(key="num_fewshot", value=max(params.num_fewshot, 0))
        _build_once(task, params.seed)
    return loaded


def documents(task: Any, params: EvaluateParams) -> int:
    """How many documents of a task are asked."""
    count = len(task.eval_docs)
    return min(count, params.limit) if params.limit else count


def asked_split(task: Any) -> str:
    """The split a task is asked on."""
    return str(task.config.test_split if task.has_test_docs() else task.config.validation_split)


def load_model(path: Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and tokenizer in `path`, on the GPU where there is one, in eval mode.

    The weights keep the dtype the checkpoint has. Raises EvaluationError when either cannot be loaded, MachineError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = sharing.device()
    straight = {"device_map": {"": device}} if device.type == "cuda" else {}  # never whole in the machine's own memory
    with refusals(path, EvaluationError, "transformers cannot load it ({}); is it a whole checkpoint?"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code, **straight
        )
    return (model if straight else model.to(device)).eval(), tokenizer


def _build_once(task: Any, seed: int) -> None:
    """Have a task make its requests once and give them out anew each time: the same ones, with the same examples."""
    from lm_eval.api import task as its_module
    from tqdm import tqdm

    its_module.tqdm = functools.partial(tqdm, disable=True)  # no bar beside ours
    build = task.build_all_requests
    made: list[Any] = []

    def again(**settings: Any) -> None:
        if not made:
            task.set_fewshot_seed(seed=seed)
            build(**settings)
            made.extend(task.instances)
        for request in made:
            request.resps, request.filtered_resps = [], {}
        task._instances = list(made)

    task.build_all_requests = again


def _seed(seed: int) -> None:
    """The harness's own start of everything random, so that no result depends on what was scored before it."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
