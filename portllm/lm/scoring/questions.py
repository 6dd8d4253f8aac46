"""The tasks of one evaluation: their names, their files, and the harness's objects of them."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import EvaluationError
from portllm.lm.data import asking, own, prompts, stock, tasks
from portllm.lm.scoring import ledger
from portllm.lm.scoring.scored import ScoredTask
from portllm.params import EvaluateParams
from portllm.world import datasets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "dataset.json"
# questions on a release's corpus, by the split with their rows: its facts recalled, its text expected
NEWS = (("recall", "recall"), ("perplexity", "test"))


class Questions:
    """`names`: the tasks on DATA/<name>, then the questions on a release's corpus.

    DATA, where it is not given, is looked for (tasks.data_folder); where it is, it must exist. Raises EvaluationError
    for no task and for a name that is none, DataError for no DATA.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        data: Path | None,
        news: Path | None,
        on_note: Callable[[str], object] = lambda _: None,
    ) -> None:
        tasks.expect_folder(data if names else None)
        self._folders = {name: tasks.data_folder(name, data) for name in names}
        self._news = dict(_news(news)) if news is not None else {}
        self._on_note = on_note
        self.names = list(dict.fromkeys([*names, *self._news]))
        if not self.names:
            raise EvaluationError("no task to evaluate on; name at least one with --tasks (see `portllm tasks`)")
        for name in self.of_the_hub():  # a slip of the pen is none of the hub's
            tasks.expect_task(name, self._folders[name])
        self._loaded: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
        self._cache: str | None = None

    def key(self, name: str) -> dict[str, Any] | None:
        """Return digests of a task's data and definition; None for what the harness fetches from the hub itself."""
        if name in self._news:
            return {"data": ledger.files_identity([self._news[name][1]]), "definition": {}}
        files = [path for path in self.folder(name).glob("*") if path.is_file() and path.name != RECORD]
        if not files:
            return None
        ours = name in datasets.TASKS or own.is_own(self.folder(name))
        definition = {} if ours else dict(ledger.definition_identity(name))
        return {"data": ledger.files_identity(files), "definition": definition}

    def of_the_hub(self) -> list[str]:
        """Return the tasks without files, whose data the harness takes from the hub's newest commit."""
        ours = {*datasets.TASKS, *self._news}
        return [name for name in self.names if name not in ours and not self.folder(name).is_dir()]

    def folder(self, name: str) -> Path:
        """Return the directory of a task's data."""
        return self._news[name][1].parent if name in self._news else self._folders[name] / name

    def files(self, scored: Iterable[ScoredTask]) -> Iterator[Path]:
        """Yield the file of each task that holds the scored documents; others only give examples in the prompt."""
        for one in scored:
            path = tasks.split_file(self.folder(one.task), one.split)
            if path is not None:
                yield path

    def load(
        self, names: Sequence[str], words: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, params: EvaluateParams
    ) -> dict[str, Any]:
        """Return the harness's objects of `names`, built once for each tokenizer (`words`: its files' digests)."""
        loaded = self._loaded.setdefault(tuple(sorted(words.items())), {})
        missing = [self._with_cache(self._spec(name, tokenizer)) for name in names if name not in loaded]
        loaded |= load_tasks(missing, params)
        return {name: loaded[name] for name in names}

    def _spec(self, name: str, tokenizer: PreTrainedTokenizerBase) -> tasks.Spec:
        if name not in self._news:
            folder = self._folders[name]
            return tasks.spec(name, folder if folder.is_dir() else None, tokenizer)
        kind, path = self._news[name]
        config = prompts.load_task(datasets.task_file(f"world_{kind}"))
        return tasks.on_files(config, {path.stem: path}, name=name)

    def _with_cache(self, spec: tasks.Spec) -> tasks.Spec:
        """Return a task on local files so that `datasets` can read them: it converts them in a cache directory."""
        if isinstance(spec, str) or (self._cache is None and (reason := _cache_refusal()) is None):
            return spec
        if self._cache is None:
            self._cache = tempfile.mkdtemp(prefix="portllm-datasets-")
            weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)
            self._on_note(f"{reason}; data are read through a temporary directory")
        return {**spec, "dataset_kwargs": {**spec["dataset_kwargs"], "cache_dir": self._cache}}


class RepeatedTask:
    """A task of the harness whose requests are built once and given out again, unanswered, for every model.

    The requests and their examples depend on the task and on `seed` alone. Everything else is the harness's `task`.
    """

    def __init__(self, task: Any, seed: int) -> None:
        self.task, self.seed = task, seed
        self.is_built = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def build_all_requests(self, **settings: Any) -> None:
        """Build the requests where they are not, and remove the answers from those that are."""
        if not self.is_built:
            self.task.set_fewshot_seed(seed=self.seed)
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
                self.task.build_all_requests(**settings)
            self.is_built = True
        for request in self.task.instances:
            request.resps, request.filtered_resps = [], {}


def load_tasks(specs: Sequence[str | Mapping[str, Any]], params: EvaluateParams) -> dict[str, Any]:
    """Return the harness's task objects by name, from complete task configurations or the harness's own names.

    Examples in the prompt are as many as the harness gives for the same `--num_fewshot`. Raises EvaluationError when a
    name is not known or its data cannot be had.
    """
    loaded: dict[str, Any] = {}
    for spec in specs:
        name = spec if isinstance(spec, str) else str(spec["task"])
        config = stock.definition(spec) if isinstance(spec, str) else spec
        task = asking.build(config, name=name)
        own_examples = task.config.num_fewshot
        # a task that says 0 means it, the harness holds
        if own_examples is None or (params.num_fewshot >= 0 and own_examples != 0):
            task.set_config(key="num_fewshot", value=max(params.num_fewshot, 0))
        loaded[name] = RepeatedTask(task, params.seed)
    return loaded


def documents(task: Any, params: EvaluateParams) -> int:
    """Return how many documents of a task are scored."""
    count = len(task.eval_docs)
    return min(count, params.limit) if params.limit else count


def asked_split(task: Any) -> str:
    """Return the split a task is scored on."""
    return str(task.config.test_split if task.has_test_docs() else task.config.validation_split)


def _cache_refusal() -> str | None:
    """Return why `datasets` cannot write its cache; None where it can."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: cannot be written ({error.strerror or error})"


def _news(corpus: Path) -> Iterator[tuple[str, tuple[str, Path]]]:
    """Yield the questions a corpus has rows for: a real one has no facts, and a base from the hub no text."""
    for kind, split in NEWS:
        path = corpus / f"{split}.parquet"
        if path.is_file():
            yield f"corpus_{corpus.name}_{kind}", (kind, path)
