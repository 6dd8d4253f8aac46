"""The requests the harness makes of a row, and the right answer: both from the harness's own task object."""

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
    """Build the harness's task object from a complete configuration, its templates confined (`confine_templates`).

    Raises DataError where its data do not fit it, EvaluationError for a metric that is third-party code.
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
    """A row as the harness requests it: `pair` with the right answer, and `question`, all other texts of the row.

    Rows with the same question are the same to a model, whichever answer is right.
    """

    pair: Pair
    question: str


def rows(task: Any, *, name: str, split: str) -> Iterator[Asked]:
    """Yield every row of the task's training split, without examples in the prompt.

    Raises DataError naming the row, EvaluationError for a type of task without text to train on.
    """
    from jinja2 import TemplateError

    if task.config.doc_to_image or task.config.doc_to_audio:
        raise EvaluationError(f"{name}: has images or sound; expected a task of text alone")
    right = _KINDS.get(task.OUTPUT_TYPE)
    if right is None:
        raise EvaluationError(
            f"{name}: a task of type {task.OUTPUT_TYPE} has no answer to train on; expected {', '.join(_KINDS)}"
        )
    for number, row in enumerate(task.training_docs()):
        try:
            yield right(task, row)
        except DataError as error:
            raise DataError(f"{name}: row {number} of {split}: {error}") from error
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, AssertionError, TemplateError) as error:
            columns = ", ".join(map(str, row))
            text = f"the task's definition does not fit it ({reason(error)}); its columns are {columns}"
            raise DataError(f"{name}: row {number} of {split}: {text}") from error


def _requests(task: Any, row: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of every request the harness makes of the row, without examples."""
    context = task.fewshot_context(row, num_fewshot=0, gen_prefix=task.doc_to_prefix(row))
    requests = task.construct_requests(doc=row, ctx=context, metadata=(task.task_name, 0, 1))
    return [one.args for one in (requests if isinstance(requests, list) else [requests])]


def _compared(task: Any, row: Mapping[str, Any]) -> Asked:
    """Return the one request of a row whose answer's likelihood is measured."""
    ((context, continuation),) = _requests(task, row)
    pair = _text(context, "question"), _text(continuation, "answer")
    return Asked(pair, pair[0] if pair[0].strip() else pair[1])


def _chosen(task: Any, row: Mapping[str, Any]) -> Asked:
    """Return the request of the right choice; with several inputs (winogrande) the choice is in the context."""
    choices = task.doc_to_choice(row)
    gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    asked = _requests(task, row)
    context, continuation = asked[_index(gold, choices)]
    pair = _text(context, "question"), _text(continuation, "answer")
    return Asked(pair, "\n".join(str(text) for one in asked for text in one))


def _generated(task: Any, row: Mapping[str, Any]) -> Asked:
    """Return the request's context, and the text after the same question in a few-shot example."""
    ((context, *_),) = _requests(task, row)
    target = task.doc_to_target(row)
    choices = task.doc_to_choice(row) if task.config.doc_to_choice is not None else None
    if choices is not None:
        target = choices[_index(target, choices)]
    if isinstance(target, (list, tuple)):
        raise DataError(f"has {len(target)} right answers, expected one; choose another task to train on")
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
    """Return the right choice's index. Raises DataError where the harness would find no right answer."""
    if isinstance(gold, str):
        if gold not in choices:
            raise DataError(f"answer {gold!r:.60} is not among the choices {choices!r:.200}")
        return int(choices.index(gold))
    if isinstance(gold, (list, tuple)):
        raise DataError(f"has {len(gold)} right answers, expected one; choose another task to train on")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        hint = " (-1 hides a label)" if gold == -1 else ""
        raise DataError(
            f"label {gold!r:.60}{hint} is out of range, expected 0 to {len(choices) - 1} for {choices!r:.200}"
        )
    return int(gold)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"its {what} is {value!r:.60}, expected text")
    return value


def confine_templates() -> None:
    """Configure the harness to render its templates in jinja's sandbox, so that a task file cannot run code.

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
    """Raise EvaluationError for a metric unknown to the harness, which it would load as a script, even from the hub."""
    import lm_eval.api.metrics  # noqa: F401  (it fills the registry)
    from lm_eval.api.registry import metric_registry

    if config.get("process_results") is not None:  # metrics are then mere names
        return
    for one in config.get("metric_list") or ():
        metric = one.get("metric")
        if isinstance(metric, str) and (one.get("hf_evaluate") or metric not in metric_registry):
            raise EvaluationError(
                f"{name}: its metric {metric!r:.60} is not one of the harness's own but code to load, which portllm "
                "does not run; choose another metric or task"
            )


def reason(error: BaseException) -> str:
    """Return a library's error in one line: its cause, where it has one."""
    cause = error.__cause__ or error
    if isinstance(cause, KeyError):
        return f"no column {cause}"
    return first_line(cause)
