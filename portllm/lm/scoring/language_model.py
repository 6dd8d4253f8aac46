"""The harness's language model with batches of ours: of a size that fits into memory, shared by all processes.

Encoding, log-likelihoods and generation are the harness's own (HFLM), reached through its public methods alone. Ours is
which requests are read together: the longest first and requests of one context in one row, as the harness orders them;
a batch that does not fit is halved. To the harness there is one process only. Several share the batches, not the
documents, so that neither the rows of a batch nor the order in which a metric is summed depends on their number.

This module imports the harness (seconds): it is imported only where a model is scored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from transformers import LogitsProcessor, LogitsProcessorList

from portllm import processes
from portllm.errors import EvaluationError
from portllm.lm import opening
from portllm.lm.scoring import sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = TypeVar("Answer")
OnAnswered = Callable[[float], None]  # the share of the requests that are answered
Encoding = tuple[list[int], list[int]]  # tokens of a context and of its continuation

MOST_ROWS = 128
MOST_TOKENS = {"cpu": 4096, "cuda": 65536}  # more of them read at once make nothing faster
WRITTEN = 8  # times as many where text is written, a token of every row at a time
SHARE = {"cpu": 0.2, "cuda": 0.5}  # of the free memory, for one batch; where that is too much, the batch is halved
LOGITS = 3  # a token's logits, their log-softmax, and what computes it
STATES = 24  # hidden states' worth of memory that a token takes on its way through a layer
NOT_FINITE = (
    "expected finite numbers: the weights are damaged, or their values overflow in their dtype; evaluate a model that "
    "was trained and saved without overflow"
)


@dataclass(frozen=True)
class Group:
    """Requests (by number) that the model reads in one row of `tokens`, or in `rows` of at most that length."""

    requests: tuple[int, ...]
    tokens: int
    rows: int = 1


@dataclass(frozen=True)
class Batch:
    """Groups read together, in at most `rows` rows at once."""

    groups: tuple[Group, ...]
    rows: int


class BatchedLM(HFLM):  # type: ignore[misc]  # the harness has no types
    """HFLM with batches of `rows` rows (0: as many as fit) that refuses numbers that are not finite.

    `active` is the model that answers: the base, or a PEFT model over it. `truncated` collects the numbers of the
    documents whose prompt is longer than the model's context; the harness drops the beginning of such a prompt.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rows: int = 0) -> None:
        self.active: Any = model
        limit = resolve_max_length(model.config, tokenizer)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=limit)
        self.on_answered: OnAnswered | None = None
        self.truncated: set[int] = set()
        self.batch_rows = rows
        self.free_bytes = min(sharing.gathered(_free_bytes(self.device)))
        known = opening.known_tokens(model)
        self.known_tokens = known if len(tokenizer) > known else None  # None: all that the tokenizer can make
        self.encodings: dict[tuple[str, bool | None], array[int]] = {}
        self.parts = 1  # of a batch that was too large, and of those after it

    @property
    def model(self) -> Any:
        """The model that answers."""
        return self.active

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **rest: Any
    ) -> list[int]:
        """Return the tokens of a text, encoded once: the prompts are the same for every patch."""
        if left_truncate_len is not None or rest:
            return list(super().tok_encode(string, add_special_tokens, left_truncate_len, **rest))
        key = (string, add_special_tokens)
        if key not in self.encodings:
            self.encodings[key] = array("q", super().tok_encode(string, add_special_tokens))
        return list(self.encodings[key])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation in nats, whether it is the greedy one) of every request.

        Raises EvaluationError for a continuation without a token and for a log-likelihood that is not finite.
        """
        pairs = [self._encoded(*request.args) for request in requests]
        self._expect_known([*context, *continuation] for context, continuation in pairs)
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            if not continuation:
                raise EvaluationError(
                    f"an answer without a token cannot be scored: {request.args!r:.200}; fix the task"
                )
            if len(context) + len(continuation) > self.max_length + 1:
                self.truncated.add(request.doc_id)

        def ask(numbers: Sequence[int]) -> list[tuple[float, bool]]:
            answers = super(BatchedLM, self).loglikelihood([requests[i] for i in numbers], disable_tqdm=disable_tqdm)
            return [self._finite(answer, requests[i]) for i, answer in zip(numbers, answers, strict=True)]

        return self._answers(self._cut(grouped(pairs), self._read_bytes()), ask, len(requests))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each complete text in nats. Raises EvaluationError where it is not finite."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        self._expect_known(texts)
        short = [i for i, text in enumerate(texts) if len(text) <= self.max_length]
        pairs = {i: ([self.prefix_token_id], texts[i]) for i in short}
        long = sorted((i for i in range(len(texts)) if i not in pairs), key=lambda i: (-len(texts[i]), texts[i]))
        windows = [Group((i,), self.max_length, math.ceil(len(texts[i]) / self.max_length)) for i in long]
        groups = [dataclasses.replace(g, requests=tuple(short[i] for i in g.requests)) for g in grouped(pairs.values())]

        def ask(numbers: Sequence[int]) -> list[float]:
            with _without_bars():  # the harness draws one in any case
                answers = super(BatchedLM, self).loglikelihood_rolling([requests[i] for i in numbers], disable_tqdm)
            return [self._finite(answer, requests[i]) for i, answer in zip(numbers, answers, strict=True)]

        return self._answers(self._cut([*windows, *groups], self._read_bytes()), ask, len(requests))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what the model writes after each context, up to the first stop sequence.

        Raises EvaluationError where its logits are not finite.
        """
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        self._expect_known(contexts)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        batches: list[Batch] = []
        for numbers in alike.values():
            more = int(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)["max_gen_toks"])
            self.truncated |= {requests[i].doc_id for i in numbers if len(contexts[i]) > self.max_length - more}
            # as the harness orders them, so that the same rows share a batch
            numbers.sort(key=lambda i: (-len(contexts[i]), requests[i].args[0]))
            groups = [Group((i,), more + len(contexts[i])) for i in numbers]
            batches += self._cut(groups, self._written_bytes(), most=WRITTEN)
        check = LogitsProcessorList([FiniteLogits()])
        checked = [_with_check(request, check) for request in requests]

        def ask(numbers: Sequence[int]) -> list[str]:
            return list(super(BatchedLM, self).generate_until([checked[i] for i in numbers], disable_tqdm=disable_tqdm))

        return self._answers(batches, ask, len(requests))

    def _encoded(self, context: str, continuation: str) -> Encoding:
        """Encode a request as the harness does: batches are made of the rows that it will read."""
        if not context:
            tokens = self.tok_encode(continuation, add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                return tokens[:1], tokens[1:]
            return [self.prefix_token_id], tokens
        head = self.tok_encode(context.rstrip())  # spaces between the two belong to the continuation
        return head, self.tok_encode(context + continuation)[len(head) :]

    def _expect_known(self, rows: Iterable[Sequence[int]]) -> None:
        limit = self.known_tokens
        if limit is not None and (highest := max(map(max, filter(None, rows)), default=0)) >= limit:
            raise EvaluationError(opening.unknown(highest, limit))

    def _finite(self, answer: Answer, request: Any) -> Answer:
        value: Any = answer[0] if isinstance(answer, tuple) else answer
        if not math.isfinite(value):
            raise EvaluationError(f"the log-likelihood of {request.args[-1]!r:.60} is {value}; {NOT_FINITE}")
        return answer

    def _cut(self, groups: Sequence[Group], token_bytes: int, *, most: int = 1) -> list[Batch]:
        if self.batch_rows:
            return cut(groups, rows=self.batch_rows, room=0)
        kind = self.device.type if self.device.type in SHARE else "cpu"
        fits = int(SHARE[kind] * self.free_bytes) // token_bytes
        return cut(groups, rows=MOST_ROWS, room=max(1, min(fits, most * MOST_TOKENS[kind])))

    def _answers(
        self, batches: Sequence[Batch], ask: Callable[[Sequence[int]], list[Answer]], total: int
    ) -> list[Answer]:
        answers: dict[int, Answer] = {}
        self.parts = 1
        for batch in batches[processes.index() :: processes.count()]:
            answers |= self._fitting(batch, ask)
            if self.on_answered:
                self.on_answered(min(len(answers) * processes.count() / total, 1.0))
        for rest in sharing.gathered(answers):
            answers |= rest
        return [answers[i] for i in range(total)]

    def _fitting(self, batch: Batch, ask: Callable[[Sequence[int]], list[Answer]]) -> dict[int, Answer]:
        """Return the answers to a batch, in ever smaller parts where it does not fit. Raises EvaluationError."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        answers: dict[int, Answer] = {}
        done = 0
        while done < len(batch.groups):
            part = batch.groups[done : done + max(1, len(batch.groups) // self.parts)]
            rows = max(1, batch.rows // self.parts)
            self.batch_size_per_gpu = rows_at_once(part, rows)
            numbers = [i for group in part for i in group.requests]
            try:
                answers |= zip(numbers, ask(numbers), strict=True)
                done += len(part)
                continue
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(part) == rows == 1:
                    raise EvaluationError(
                        f"one row does not fit into the memory of {self.device} next to the model "
                        f"({str(error):.80}); free some of it, or use a larger device"
                    ) from error
            clear_device_cache(garbage_collection=True)  # only here is the failed batch out of use
            self.parts *= 2
        return answers

    def _read_bytes(self) -> int:
        """Return what a token takes, roughly, while it is read: logits over the vocabulary, and its way in a layer."""
        config = self.config.get_text_config()
        return int(_itemsize(self.model) * (LOGITS * config.vocab_size + STATES * config.hidden_size))

    def _written_bytes(self) -> int:
        """Return what a token takes, roughly, while a text is written: its keys and values in every layer."""
        config = self.config.get_text_config()
        return int(_itemsize(self.model) * (2 * config.num_hidden_layers + STATES) * config.hidden_size)


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]  # transformers' types are not followed
    """Refuses logits that no token can be chosen by: an argmax over NaN would pass for an answer."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  (its signature)
        """Return `scores` (rows, vocabulary) as they are. Raises EvaluationError for NaN and +infinity."""
        if not bool((scores < math.inf).all()):  # NaN is not below anything; others may exclude tokens by -infinity
            raise EvaluationError(f"the logits hold NaN or infinity while a text is written; {NOT_FINITE}")
        return scores


def grouped(pairs: Iterable[Encoding]) -> list[Group]:
    """Return requests by the row that answers them, in the harness's order: the longest first.

    Requests whose context and continuation differ in the last token alone are answered by one row.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    ends: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        row = (*context, *continuation[:-1])
        rows.setdefault(row, []).append(i)
        # of one row's requests the harness reads the longest continuation
        ends[row] = max(ends.get(row, []), continuation, key=len)
    ordered = sorted(rows, key=lambda row: (-len(row), row, ends[row][-1:]))
    return [Group(tuple(rows[row]), len(row)) for row in ordered]


def cut(groups: Sequence[Group], *, rows: int, room: int) -> list[Batch]:
    """Return `groups`, longest first, in batches of at most `rows` rows and `room` tokens (0: any), padding included.

    A batch has one group at least.
    """
    batches: list[Batch] = []
    held: list[Group] = []
    limit = rows

    def close() -> None:
        if held:
            batches.append(Batch(tuple(held), min(limit, sum(group.rows for group in held))))
            held.clear()

    for group in groups:
        if sum(one.rows for one in held) + group.rows > limit:
            close()
        if not held:
            limit = max(1, min(rows, room // max(1, group.tokens))) if room else rows
        held.append(group)
    close()
    return batches


def rows_at_once(groups: Sequence[Group], rows: int) -> int:
    """Return the batch size that has the harness read `groups` in one batch, or in batches of `rows` rows at most.

    It counts the requests of one row singly, before it finds that one row answers them.
    """
    windows = sum(max(group.rows, len(group.requests)) for group in groups)
    return windows if sum(group.rows for group in groups) <= rows else rows


def _with_check(request: Any, check: LogitsProcessorList) -> SimpleNamespace:
    """Return a request to write text whose logits are checked; the harness hands its settings to `generate`.

    `check` is one object for all: requests with equal settings share a batch.
    """
    context, settings = request.args
    return SimpleNamespace(args=(context, {**settings, "logits_processor": check}))


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the harness's progress bars, which have no switch, off the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _itemsize(model: Any) -> int:
    return int(next(model.parameters()).element_size())


def _free_bytes(device: Any) -> int:
    """Return the memory free for batches on `device`, in this process's share of it."""
    if device.type == "cuda":
        import torch

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    import psutil

    return int(psutil.virtual_memory().available) // processes.count()
