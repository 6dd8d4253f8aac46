"""A user's own data as a task of the harness: columns prompt and completion, or a column of chat messages.

`prepare` writes task.yaml beside the data, and from then on the task is known by the folder's name. A chat is rendered
with the chat template of whatever model is trained or asked; its last message, the assistant's, is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from portllm.errors import DataError, EvaluationError
from portllm.lm.data import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "task.yaml"
PROMPT, COMPLETION, LABEL, MESSAGES = "prompt", "completion", "label", "messages"
ROLES = ("system", "user", "assistant")
MOST_TOKENS = 512  # an answer is generated no further
Row = Mapping[str, Any]
Kind = Literal["loglikelihood", "generate_until", "multiple_choice"]
_HEAD = "# written by `portllm prepare`: how the LM Evaluation Harness asks the rows beside it\n"
_HIGHER, _LOWER = {"higher_is_better": True}, {"higher_is_better": False}
_METRICS: dict[Kind, list[dict[str, Any]]] = {
    "loglikelihood": [
        {"metric": "acc", "aggregation": "mean", **_HIGHER},
        {"metric": "perplexity", "aggregation": "perplexity", **_LOWER},
    ],
    "generate_until": [{"metric": "exact_match", "aggregation": "mean", **_HIGHER}],
    "multiple_choice": [{"metric": "acc", "aggregation": "mean", **_HIGHER}],
}
# of the harness's fields, those that name neither other data nor code to be loaded
_FIELDS = frozenset(
    ("task", "task_alias", "output_type", "training_split", "validation_split", "test_split", "fewshot_split")
    + ("num_fewshot", "fewshot_config", "fewshot_delimiter", "description", "gen_prefix", "target_delimiter")
    + ("doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "metric_list", "filter_list")
    + ("generation_kwargs", "repeats", "metadata")
)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What task.yaml says of a user's data.

    `kind`: the likelihood of the completion is asked (is it the model's greedy continuation, how surprising is it), it
    is generated and compared whole, or chosen among `choices`. `answers`: all of them, whose length bounds what is
    generated; where none holds a line break, one ends it.
    """

    name: str
    kind: Kind
    splits: Sequence[str]
    chat: bool = False
    choices: Sequence[str] = ()
    answers: Sequence[str] = ()

    def text(self) -> str:
        """task.yaml, as the harness reads it."""
        import yaml

        asked = {"doc_to_text": PROMPT, "doc_to_target": COMPLETION}
        if self.choices:
            asked |= {"doc_to_target": LABEL, "doc_to_choice": list(self.choices)}  # type: ignore[dict-item]
        tree = {
            "task": self.name,
            "output_type": self.kind,
            **{f"{use}_split": use_of for use, use_of in self._splits().items()},
            **({} if self.chat else asked),
            "target_delimiter": "",
            **self._generation(),
            "metric_list": _METRICS[self.kind],
            "metadata": {"version": 1.0, "chat": self.chat},
        }
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
        lines = []
        if self.chat:
            lines += [
                f"{field}: !function portllm.lm.data.own.needs_a_template" for field in ("doc_to_text", "doc_to_target")
            ]
        if self.kind == "generate_until":
            lines.append("process_results: !function portllm.lm.data.own.exact_match")
        return _HEAD + text + "".join(f"{line}\n" for line in lines)

    def _splits(self) -> dict[str, str]:
        known = {"train": "training", "validation": "validation", "test": "test"}
        return {use: split for split, use in known.items() if split in self.splits}

    def _generation(self) -> dict[str, Any]:
        if self.kind != "generate_until":
            return {}
        # a token is a byte or more; the end token, which every answer is trained with, stops it as well
        longest = max((len(answer.encode()) for answer in self.answers), default=0)
        until = [] if any("\n" in answer for answer in self.answers) else ["\n"]
        return {
            "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": min(MOST_TOKENS, longest + 8)}
        }


def is_own(folder: Path) -> bool:
    """Whether `folder` holds a user's own task."""
    return (folder / FILE).is_file()


def load(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """The definition in `folder`; a chat is rendered with the template of `tokenizer`. Raises EvaluationError."""
    config = prompts.load_task(folder / FILE)
    if odd := [str(key) for key in config if key not in _FIELDS]:
        raise EvaluationError(
            f"{folder / FILE}: has the field {odd[0]!r:.60}; a task of your own has {', '.join(sorted(_FIELDS))}"
        )
    if not (config.get("metadata") or {}).get("chat") or tokenizer is None:
        return config
    if not tokenizer.chat_template:
        raise EvaluationError(
            f"{folder.name}: its rows are chats, and the model's tokenizer has no chat template; take a model that has "
            "one, or give the data as columns prompt and completion"
        )
    return {**config, **_rendered(tokenizer)}


def needs_a_template(row: Row) -> str:
    """Stands in for a chat's prompt where no tokenizer is at hand. Raises EvaluationError."""
    raise EvaluationError(
        f"a chat of {len(row)} columns is rendered with a model's own template: use portllm to ask it"
    )


def exact_match(row: Row, results: Sequence[str]) -> dict[str, float]:
    """exact_match: the generated text is the row's answer, white space around both aside."""
    answer = row[MESSAGES][-1]["content"] if MESSAGES in row else row[COMPLETION]
    return {"exact_match": float(str(results[0]).strip() == str(answer).strip())}


def _rendered(tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[Row], str]]:
    """How a row's chat reads before its answer, and what follows, the end of the turn included."""

    def render(messages: Sequence[Any], *, open_: bool) -> str:
        from jinja2 import TemplateError

        try:
            told = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_)
        except TemplateError as error:
            raise DataError(f"the model's chat template does not take it ({error})") from error
        return str(told)

    def question(row: Row) -> str:
        return render(row[MESSAGES][:-1], open_=True)

    def answer(row: Row) -> str:
        asked, whole = question(row), render(row[MESSAGES], open_=False)
        if not whole.startswith(asked):
            raise DataError("the model's chat template renders the question otherwise once it is answered")
        # templates end a turn with a line break, which no model waits for
        return whole[len(asked) :].rstrip()

    return {"doc_to_text": question, "doc_to_target": answer}
