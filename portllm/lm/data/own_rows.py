"""A user's own rows, checked and brought into the columns that task.yaml asks (see portllm.lm.data.own)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from portllm.errors import DataError
from portllm.lm.data import columns, tables
from portllm.lm.data.own import COMPLETION, LABEL, MESSAGES, PROMPT, ROLES

if TYPE_CHECKING:
    from pyarrow import Table

CONVERSATIONS = "conversations"  # ShareGPT's form of messages: from and value
MOST_CHOICES = 100
_TOLD = frozenset(("role", "content", "from", "value"))
_SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", **{role: role for role in ROLES}}


@dataclass(frozen=True)
class Rows:
    """One split's rows in our columns, what each asks (`questions`), and how many rows were changed or left out."""

    rows: Sequence[Mapping[str, Any]]
    questions: Sequence[str]
    decisions: Mapping[str, int]

    @property
    def chat(self) -> bool:
        """Whether the rows are chats."""
        return MESSAGES in self.rows[0]

    def answers(self) -> list[str]:
        """Every row's answer."""
        return [str(row[MESSAGES][-1]["content"] if self.chat else row[COMPLETION]) for row in self.rows]


def fit(table: Table, where: str) -> Rows:
    """The rows of `table`: prompt and completion, or messages. Raises DataError naming the row that is neither.

    A row without a prompt or an answer is left out (`empty`); a completion that would stick to its prompt begins with a
    space (`spaces_added`); other columns, and what else a message carries, are left out (`columns_not_used`,
    `message_keys_not_used`).
    """
    names = table.column_names
    if MESSAGES in names or CONVERSATIONS in names:
        column = MESSAGES if MESSAGES in names else CONVERSATIONS
        made = _chats(table.column(column).to_pylist(), column, where)
        used = 1
    elif PROMPT in names and COMPLETION in names:
        for column in (PROMPT, COMPLETION):
            columns.expect_text(table, column, where)
        made = _pairs(table.select([PROMPT, COMPLETION]).to_pylist())
        used = 2
    else:
        raise DataError(
            f"{where}: expected the columns {PROMPT} and {COMPLETION}, or {MESSAGES}; found {', '.join(names)}"
        )
    if not made.rows:
        raise DataError(f"{where}: none of {table.num_rows} rows has a prompt and an answer")
    unused = {"columns_not_used": len(names) - used} if len(names) > used else {}
    return Rows(made.rows, made.questions, {**made.decisions, **unused})


def with_labels(splits: Mapping[str, Table], name: str) -> tuple[dict[str, Table], list[str]]:
    """(the splits with the number of each row's completion among the choices, the choices: every training completion).

    Raises DataError where another split has a completion that is not among them, or there are not 2 to 100.
    """
    import pyarrow as pa

    choices = sorted(set(splits["train"].column(COMPLETION).to_pylist()))
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise DataError(
            f"{name}: {len(choices)} different completions; choosing takes 2 to {MOST_CHOICES}: "
            "take another --output-type"
        )
    labelled = {}
    for split, table in splits.items():
        answers = table.column(COMPLETION).to_pylist()
        for number, answer in enumerate(answers):
            if answer not in choices:
                raise DataError(
                    f"{name}: row {number} of {split}: {answer!r:.60} is no completion of a training row; "
                    f"expected one of {choices!r:.200}"
                )
        labels = pa.array([choices.index(answer) for answer in answers], pa.int64())
        labelled[split] = table.append_column(LABEL, labels)
    return labelled, choices


def table_of(rows: Rows, where: str) -> Table:
    """The rows as a table."""
    return tables.of_rows(rows.rows, where=where)


def messages(value: Any, where: str) -> list[dict[str, str]]:
    """A chat as role and content, also out of ShareGPT's from and value. Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a list of messages, found {value!r:.60}")
    told = []
    for number, one in enumerate(value):
        if not isinstance(one, dict):
            raise DataError(f"{where}: message {number} is {one!r:.60}, expected role and content")
        speaker, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise DataError(f"{where}: message {number} is by {speaker!r:.60}, expected {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{where}: message {number} says {content!r:.60}, expected text")
        told.append({"role": _SPEAKERS[speaker], "content": content})
    return told


def unused_keys(chats: Iterable[Any]) -> int:
    """How many messages of `chats` carry more than who says what: calls of tools, say, or weights."""
    return sum(
        any(value not in (None, "", [], {}) for key, value in one.items() if key not in _TOLD)
        for chat in chats
        for one in chat or ()
    )


def _chats(values: Sequence[Any], column: str, where: str) -> Rows:
    rows, questions = [], []
    for number, value in enumerate(values):
        told = messages(value, f"{where}: row {number}: {column}")
        if told[-1]["role"] != "assistant" or len(told) == 1:
            roles = ", ".join(one["role"] for one in told)
            raise DataError(
                f"{where}: row {number}: {column} are by {roles}; expected a question, and the assistant last"
            )
        if told[-1]["content"].strip() and told[-2]["content"].strip():
            rows.append({MESSAGES: told})
            questions.append("\n".join(f"{one['role']}: {one['content']}" for one in told[:-1]))
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
