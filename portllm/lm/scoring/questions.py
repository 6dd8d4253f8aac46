"""The tasks of one evaluation: their names, their files, and their definitions once there is a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import EvaluationError
from portllm.lm.data import own, prompts, tasks
from portllm.lm.scoring import evaluation, identity
from portllm.lm.scoring.scored import Scored
from portllm.params import EvaluateParams
from portllm.world import datasets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "dataset.json"
# a release's corpus, asked: does the model know its facts, and is it surprised by its text?
NEWS = (("recall", "recall"), ("perplexity", "test"))


class Questions:
    """`names`: the tasks on DATA/<name>, then what a release's corpus is asked.

    DATA, where it is not given, is looked for (tasks.data_folder); where it is, it must exist. Raises EvaluationError
    for no task and for a name that is none, DataError for no DATA.
    """

    def __init__(self, names: Sequence[str], *, data: Path | None, news: Path | None) -> None:
        tasks.expect_folder(data if names else None)
        self._folders = {name: tasks.data_folder(name, data) for name in names}
        self._news = dict(_news(news)) if news is not None else {}
        self.names = list(dict.fromkeys([*names, *self._news]))
        if not self.names:
            raise EvaluationError("no task to evaluate on; name at least one with --tasks (see `portllm tasks`)")
        for name in self.of_the_hub():  # a slip of the pen is none of the hub's
            tasks.expect_task(name, self._folders[name])
        self._loaded: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}

    def key(self, name: str) -> dict[str, Any] | None:
        """Digests of a task's data and definition; None for what the harness fetches from the hub itself."""
        if name in self._news:
            return {"data": identity.of_files([self._news[name][1]]), "definition": {}}
        files = [path for path in self.folder(name).glob("*") if path.is_file() and path.name != RECORD]
        if not files:
            return None
        ours = name in datasets.TASKS or own.is_own(self.folder(name))
        return {"data": identity.of_files(files), "definition": {} if ours else dict(identity.of_definition(name))}

    def of_the_hub(self) -> list[str]:
        """The tasks without files, which the harness asks the hub for, at whatever commit is newest."""
        ours = {*datasets.TASKS, *self._news}
        return [name for name in self.names if name not in ours and not self.folder(name).is_dir()]

    def folder(self, name: str) -> Path:
        """Where a task's data lie."""
        return self._news[name][1].parent if name in self._news else self._folders[name] / name

    def files(self, scored: Iterable[Scored]) -> Iterator[Path]:
        """The file whose rows were asked, of each task; the others are there for examples in the prompt only."""
        for one in scored:
            path = tasks.split_file(self.folder(one.task), one.split)
            if path is not None:
                yield path

    def load(
        self, names: Sequence[str], words: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, params: EvaluateParams
    ) -> dict[str, Any]:
        """The harness's task objects of `names`; made once for each tokenizer, told by the digests of its files."""
        loaded = self._loaded.setdefault(tuple(sorted(words.items())), {})
        missing = [self._spec(name, tokenizer) for name in names if name not in loaded]
        loaded |= evaluation.load_tasks(missing, params)
        return {name: loaded[name] for name in names}

    def _spec(self, name: str, tokenizer: PreTrainedTokenizerBase) -> tasks.Spec:
        if name not in self._news:
            folder = self._folders[name]
            return tasks.spec(name, folder if folder.is_dir() else None, tokenizer)
        kind, path = self._news[name]
        config = prompts.load_task(datasets.task_file(f"world_{kind}"))
        return tasks.on_files(config, {path.stem: path}, name=name)


def _news(corpus: Path) -> Iterator[tuple[str, tuple[str, Path]]]:
    """What can be asked of a corpus: a real one has no facts, and a base from the hub no text."""
    for kind, split in NEWS:
        path = corpus / f"{split}.parquet"
        if path.is_file():
            yield f"corpus_{corpus.name}_{kind}", (kind, path)
