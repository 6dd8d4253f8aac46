"""A user's own data as a task of the harness: columns prompt and completion, or a column of chat messages.

`prepare` writes task.yaml next to the data; the folder's name is then the task's. A chat is rendered with the chat
template of the model that is trained or evaluated; its last message, the assistant's, is the answer. The last section
checks rows and converts them to the columns that task.yaml names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from portllm.errors import DataError, EvaluationError
from portllm.lm.data import columns, prompts, tables

if TYPE_CHECKING:
    from pyarrow import Table
    from transformers import PreTrainedTokenizerBase

FILE = "task.yaml"
PROMPT, COMPLETION, LABEL, MESSAGES = "prompt", "completion", "label", "messages"
ROLES = ("system", "user", "assistant")
CONVERSATIONS = "conversations"  # ShareGPT's form of messages: from and value
MOST_CHOICES = 100
_READ_KEYS = frozenset(("role", "content", "from", "value"))
_SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", **{role: role for role in ROLES}}
MOST_TOKENS = 512  # the longest answer that is generated
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
# the harness's fields that refer to no other data and no code to load
_FIELDS = frozenset(
    ("task", "task_alias", "output_type", "training_split", "validation_split", "test_split", "fewshot_split")
    + ("num_fewshot", "fewshot_config", "fewshot_delimiter", "description", "gen_prefix", "target_delimiter")
    + ("doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "metric_list", "filter_list")
    + ("generation_kwargs", "repeats", "metadata")
)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """The content of task.yaml for a user's data.

    `kind`: the completion's likelihood is measured (accuracy of greedy decoding, perplexity), it is generated and
    compared as a whole, or chosen from `choices`. `answers` are all answers: their length limits the generation, which
    ends at a line break where none of them contains one.
    """

    name: str
    kind: Kind
    splits: Sequence[str]
    chat: bool = False
    choices: Sequence[str] = ()
    answers: Sequence[str] = ()

    def text(self) -> str:
        """Return task.yaml, as the harness reads it."""
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
        # a token is at least a byte; the end token, part of every training answer, ends the generation, too
        longest = max((len(answer.encode()) for answer in self.answers), default=0)
        until = [] if any("\n" in answer for answer in self.answers) else ["\n"]
        return {
            "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": min(MOST_TOKENS, longest + 8)}
        }


def is_own(folder: Path) -> bool:
    """Return whether `folder` contains a user's own task."""
    return (folder / FILE).is_file()


def load(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Read the definition in `folder`; a chat is rendered with the template of `tokenizer`. Raises EvaluationError."""
    config = prompts.load_task(folder / FILE)
    if odd := [str(key) for key in config if key not in _FIELDS]:
        raise EvaluationError(
            f"{folder / FILE}: has the field {odd[0]!r:.60}; expected one of {', '.join(sorted(_FIELDS))}"
        )
    if not (config.get("metadata") or {}).get("chat") or tokenizer is None:
        return config
    if not tokenizer.chat_template:
        raise EvaluationError(
            f"{folder.name}: its rows are chats, and the model's tokenizer has no chat template; choose another "
            "model, or give the data as columns prompt and completion"
        )
    return {**config, **_rendered(tokenizer)}


def needs_a_template(row: Row) -> str:
    """Raise EvaluationError: the prompt of a chat where no tokenizer is available."""
    raise EvaluationError(f"a chat of {len(row)} columns needs a model's chat template; evaluate it with portllm")


def exact_match(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Return exact_match: whether the generated text equals the row's answer, both stripped of white space."""
    answer = row[MESSAGES][-1]["content"] if MESSAGES in row else row[COMPLETION]
    return {"exact_match": float(str(results[0]).strip() == str(answer).strip())}


def _rendered(tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[Row], str]]:
    """Return the functions that render a row's chat up to the answer, and the answer with the end of its turn."""

    def render(messages: Sequence[Any], *, open_: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_)
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses it ({error})") from error
        return str(text)

    def question(row: Row) -> str:
        return render(row[MESSAGES][:-1], open_=True)

    def answer(row: Row) -> str:
        prompt, chat = question(row), render(row[MESSAGES], open_=False)
        if not chat.startswith(prompt):
            raise DataError("the model's chat template renders the question differently before an answer")
        # templates end a turn with a line break, which no model generates
        return chat[len(prompt) :].rstrip()

    return {"doc_to_text": question, "doc_to_target": answer}


# --- rows ---


@dataclass(frozen=True)
class Rows:
    """One split's rows in our columns, the question of each, and the numbers of rows changed or left out."""

    rows: Sequence[Mapping[str, Any]]
    questions: Sequence[str]
    decisions: Mapping[str, int]

    @property
    def chat(self) -> bool:
        """Return whether the rows are chats."""
        return MESSAGES in self.rows[0]

    def answers(self) -> list[str]:
        """Return every row's answer."""
        return [str(row[MESSAGES][-1]["content"] if self.chat else row[COMPLETION]) for row in self.rows]


def fit(table: Table, where: str) -> Rows:
    """Convert `table` to rows of prompt and completion, or of messages. Raises DataError for a row that is neither.

    A row without a prompt or an answer is left out (`empty`); a completion gets a leading space where none separates
    it from its prompt (`spaces_added`); other columns, and other keys of a message, are left out (`columns_not_used`,
    `message_keys_not_used`).
    """
    names = table.column_names
    if MESSAGES in names or CONVERSATIONS in names:
        column = MESSAGES if MESSAGES in names else CONVERSATIONS
        rows = _chats(table.column(column).to_pylist(), column, where)
        used = 1
    elif PROMPT in names and COMPLETION in names:
        for column in (PROMPT, COMPLETION):
            columns.expect_text(table, column, where)
        rows = _pairs(table.select([PROMPT, COMPLETION]).to_pylist())
        used = 2
    else:
        raise DataError(
            f"{where}: expected the columns {PROMPT} and {COMPLETION}, or {MESSAGES}; found {', '.join(names)}"
        )
    if not rows.rows:
        raise DataError(f"{where}: none of {table.num_rows} rows has a prompt and an answer")
    unused = {"columns_not_used": len(names) - used} if len(names) > used else {}
    return Rows(rows.rows, rows.questions, {**rows.decisions, **unused})


def with_labels(splits: Mapping[str, Table], name: str) -> tuple[dict[str, Table], list[str]]:
    """Return the splits with each completion's number among the choices, and the choices: all training completions.

    Raises DataError where another split has a completion that is no choice, or there are not 2 to 100 choices.
    """
    import pyarrow as pa

    choices = sorted(set(splits["train"].column(COMPLETION).to_pylist()))
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise DataError(
            f"{name}: {len(choices)} different completions, expected 2 to {MOST_CHOICES} to choose from; "
            "pass another --output-type"
        )
    labelled = {}
    for split, table in splits.items():
        answers = table.column(COMPLETION).to_pylist()
        for number, answer in enumerate(answers):
            if answer not in choices:
                raise DataError(
                    f"{name}: row {number} of {split}: {answer!r:.60} is not the completion of a training row; "
                    f"expected one of {choices!r:.200}"
                )
        labels = pa.array([choices.index(answer) for answer in answers], pa.int64())
        labelled[split] = table.append_column(LABEL, labels)
    return labelled, choices


def table_of(rows: Rows, where: str) -> Table:
    """Return the rows as a table."""
    return tables.of_rows(rows.rows, where=where)


def messages(value: Any, where: str) -> list[dict[str, str]]:
    """Return a chat as role and content, also from ShareGPT's from and value. Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a list of messages, found {value!r:.60}")
    chat = []
    for number, one in enumerate(value):
        if not isinstance(one, dict):
            raise DataError(f"{where}: message {number} is {one!r:.60}, expected role and content")
        speaker, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise DataError(f"{where}: message {number} is by {speaker!r:.60}, expected {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{where}: message {number} says {content!r:.60}, expected text")
        chat.append({"role": _SPEAKERS[speaker], "content": content})
    return chat


def unused_keys(chats: Iterable[Any]) -> int:
    """Return how many messages have keys other than role and content, such as tool calls or weights."""
    return sum(
        any(value not in (None, "", [], {}) for key, value in one.items() if key not in _READ_KEYS)
        for chat in chats
        for one in chat or ()
    )


def _chats(values: Sequence[Any], column: str, where: str) -> Rows:
    rows, questions = [], []
    for number, value in enumerate(values):
        chat = messages(value, f"{where}: row {number}: {column}")
        if chat[-1]["role"] != "assistant" or len(chat) == 1:
            roles = ", ".join(one["role"] for one in chat)
            raise DataError(
                f"{where}: row {number}: {column} are by {roles}; expected a question, and the assistant last"
            )
        if chat[-1]["content"].strip() and chat[-2]["content"].strip():
            rows.append({MESSAGES: chat})
            questions.append("\n".join(f"{one['role']}: {one['content']}" for one in chat[:-1]))
    decisions = _counted(empty=len(values) - len(rows), message_keys_not_used=unused_keys(values))
    return Rows(rows, questions, decisions)


def _pairs(given: Sequence[Mapping[str, str]]) -> Rows:
    rows, spaces = [], 0
    for row in given:
        prompt, completion = row[PROMPT], row[COMPLETION]
        if not prompt.strip() or not completion.strip():
            continue
        if not prompt[-1].isspace() and not completion[0].isspace():
            completion, spaces = f" {completion}", spaces + 1
        rows.append({PROMPT: prompt, COMPLETION: completion})
    decisions = _counted(empty=len(given) - len(rows), spaces_added=spaces)
    return Rows(rows, [row[PROMPT] for row in rows], decisions)


def _counted(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
