"""What the harness asks of a row, and the answer that is right: its own task object tells both."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from portllm.errors import DataError, EvaluationError
from portllm.lm.data.encoding import Generated, Pair
from portllm.lm.data.tables import first_line
from portllm.lm.quiet import quieten


def build(config: Mapping[str, Any], *, name: str) -> Any:
    """The harness's task object of a whole configuration, its templates confined (see `confine_templates`).

    Raises DataError when its data do not fit it, EvaluationError for a metric that is code of others.
    """
    import datasets
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

    quieten()
    datasets.disable_progress_bars()
    confine_templates()
    _expect_known_metrics(config, name)
    manager = TaskManager(include_defaults=False)
    try:
        return manager.load([dict(config)])["tasks"][name]
    except (KeyError, IndexError, TemplateError, TypeError, AssertionError, ValueError) as error:
        raise DataError(f"{name}: its definition does not fit its data: {reason(error)}") from error
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{name}: its data cannot be read: {reason(error)}") from error


@dataclass(frozen=True)
class Asked:
    """A row as the harness asks it: `pair` with the right answer, and `question`, all of its texts that are no answer.

    Rows with the same question ask the same, whatever answer they call right.
    """

    pair: Pair
    question: str


def rows(task: Any, *, name: str, split: str) -> Iterator[Asked]:
    """Every row of the task's training split, without examples in the prompt.

    Raises DataError naming the row, EvaluationError for a kind of task that has no text to train on.
    """
    from jinja2 import TemplateError

    if task.config.doc_to_image or task.config.doc_to_audio:
        raise EvaluationError(f"{name}: asks about images or sound; portllm trains on text")
    right = _KINDS.get(task.OUTPUT_TYPE)
    if right is None:
        raise EvaluationError(
            f"{name}: a task of the kind {task.OUTPUT_TYPE} has no answer to train on; expected {', '.join(_KINDS)}"
        )
    for number, row in enumerate(task.training_docs()):
        try:
            yield right(task, row)
        except DataError as error:
            raise DataError(f"{name}: row {number} of {split}: {error}") from error
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, AssertionError, TemplateError) as error:
            columns = ", ".join(map(str, row))
            told = f"the task's definition does not fit it ({reason(error)}); its columns are {columns}"
            raise DataError(f"{name}: row {number} of {split}: {told}") from error


def _requests(task: Any, row: Mapping[str, Any]) -> list[Any]:
    """The arguments of every request the harness makes of the row, without examples."""
    context = task.fewshot_context(row, num_fewshot=0, gen_prefix=task.doc_to_prefix(row))
    made = task.construct_requests(doc=row, ctx=context, metadata=(task.task_name, 0, 1))
    return [one.args for one in (made if isinstance(made, list) else [made])]


def _compared(task: Any, row: Mapping[str, Any]) -> Asked:
    """The one request of a row whose answer's likelihood is asked."""
    ((context, continuation),) = _requests(task, row)
    pair = _text(context, "question"), _text(continuation, "answer")
    return Asked(pair, pair[0] if pair[0].strip() else pair[1])


def _chosen(task: Any, row: Mapping[str, Any]) -> Asked:
    """The request of the right choice; with several inputs (winogrande) the choice is in the context."""
    choices = task.doc_to_choice(row)
    gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    asked = _requests(task, row)
    context, continuation = asked[_index(gold, choices)]
    pair = _text(context, "question"), _text(continuation, "answer")
    return Asked(pair, "\n".join(str(text) for one in asked for text in one))


def _generated(task: Any, row: Mapping[str, Any]) -> Asked:
    """The request's context, and what an example in a few-shot prompt has after the same question."""
    ((context, *_),) = _requests(task, row)
    target = task.doc_to_target(row)
    choices = task.doc_to_choice(row) if task.config.doc_to_choice is not None else None
    if choices is not None:
        target = choices[_index(target, choices)]
    if isinstance(target, (list, tuple)):
        raise DataError(f"has {len(target)} right answers, one is trained on; this task cannot be trained on")
    prefix = task.doc_to_prefix(row)
    turn = functools.partial(
        task.build_qa_turn, q=task.doc_to_text(row), gen_prefix=prefix, tgt_delim=task.config.target_delimiter
    )
    open_, whole = (
        "".join(message.to_text() for message in turn(a=answer, few_delim="")) for answer in (None, str(target))
    )
    return Asked(Generated((_text(context, "question"), whole[len(open_) :])), context)


_KINDS = {"loglikelihood": _compared, "multiple_choice": _chosen, "generate_until": _generated}


def _index(gold: Any, choices: Any) -> int:
    """The right choice's place. Raises DataError for what the harness would count as no right answer."""
    if isinstance(gold, str):
        if gold not in choices:
            raise DataError(f"answer {gold!r:.60} is not among the choices {choices!r:.200}")
        return int(choices.index(gold))
    if isinstance(gold, (list, tuple)):
        raise DataError(f"has {len(gold)} right answers, one is trained on; this task cannot be trained on")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        hint = " (-1 hides a label)" if gold == -1 else ""
        raise DataError(
            f"label {gold!r:.60}{hint} is out of range, expected 0 to {len(choices) - 1} for {choices!r:.200}"
        )
    return int(gold)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"its {what} is no text but {value!r:.60}")
    return value


def confine_templates() -> None:
    """Have the harness render its templates in jinja's sandbox: whoever writes a task file runs no code with it.

    Each is compiled once, not once a row: the same text in a tenth of the time.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, SandboxedEnvironment):
        return
    confined = SandboxedEnvironment(
        loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True, autoescape=False
    )
    confined.filters.update(utils.env.filters)
    confined.from_string = functools.lru_cache(maxsize=256)(confined.from_string)
    utils.env = confined


def _expect_known_metrics(config: Mapping[str, Any], name: str) -> None:
    """The harness takes the name of a metric it does not have for a script to load, from the hub or this machine."""
    import lm_eval.api.metrics  # noqa: F401  (it fills the registry)
    from lm_eval.api.registry import metric_registry

    if config.get("process_results") is not None:  # metrics are then but names
        return
    for one in config.get("metric_list") or ():
        metric = one.get("metric")
        if isinstance(metric, str) and (one.get("hf_evaluate") or metric not in metric_registry):
            raise EvaluationError(
                f"{name}: its metric {metric!r:.60} is none of the harness's own, but code to be loaded, which portllm "
                "does not run; take another metric or task"
            )


def reason(error: BaseException) -> str:
    """An error of a library in one line, the cause before what was raised from it."""
    cause = error.__cause__ or error
    if isinstance(cause, KeyError):
        return f"no column {cause}"
    return first_line(cause)
