"""The harness's questions answered in batches: of a size that fits into memory, by all processes together.

Encoding, log-likelihoods and generation are the harness's own (HFLM). What is ours is who is asked what at once: the
longest requests first and requests of one context together, as there, and a batch that does not fit is halved. To the
harness there is one process only. Several share the batches out, not the documents, so that neither which rows stand in
one batch nor the order in which a metric is summed depends on how many processes there are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from portllm import processes
from portllm.errors import EvaluationError
from portllm.lm import opening
from portllm.lm.scoring import sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = TypeVar("Answer")
Group = Sequence[int]  # numbers of requests that are read in one row
OnAnswered = Callable[[float], None]  # the share of the requests that are answered

MOST_ROWS = 128
MOST_TOKENS = {"cpu": 4096, "cuda": 65536}  # more of them read at once make nothing faster
WRITTEN = 8  # times as many where text is written, a token of every row at a time
SHARE = {"cpu": 0.2, "cuda": 0.5}  # of the free memory, for one batch; where that is too much, the batch is halved
LOGITS = 3  # a token's logits, their log-softmax, and what computes it
STATES = 24  # hidden states' worth of memory that a token takes on its way through a layer


class Scorer:
    """A language model as the harness sees one. `rows` make a batch; 0: as many as fit."""

    rank, world_size = 0, 1

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rows: int = 0) -> None:
        from lm_eval.models.huggingface import HFLM

        self.on_answered: OnAnswered | None = None
        self._rows = rows
        self._lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self._lm._max_length = self._lm.max_length  # looked up anew for every request otherwise
        self._lm._encode_pair = functools.cache(self._lm._encode_pair)  # every patch is asked the same
        self._ask_tokens = self._lm._loglikelihood_tokens
        self._lm._loglikelihood_tokens = self._loglikelihood_tokens
        self._free_bytes = min(sharing.gathered(_free_bytes(self._lm.device)))
        known = opening.known_tokens(model)
        self._known = known if len(tokenizer) > known else None  # None: all that the tokenizer can make
        self._parts = 1  # of a batch that was too large, and of those after it

    def use(self, model: Any) -> None:
        """Ask `model` from now on: the same one with a patch on it, or without."""
        self._lm._model = self._lm.pretrained = model  # both, so that no other is kept in memory

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether it is the greedy one) of every request."""
        return list(self._lm.loglikelihood(list(requests), disable_tqdm=True))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each whole text in nats."""
        self._lm.batch_size_per_gpu = 1 << 30  # all windows at once: batches are cut below
        return list(self._lm.loglikelihood_rolling(list(requests), disable_tqdm=True))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each context, up to the first stop sequence."""
        # as the harness orders them, so that the same rows share a batch
        contexts = [self._lm.tok_encode(request.args[0]) for request in requests]
        self._expect_known(contexts)
        lengths = [-len(context) for context in contexts]
        ways: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            ways.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        batches: list[list[Group]] = []
        for same in ways.values():
            more = int(requests[same[0]].args[1].get("max_gen_toks", self._lm.max_gen_toks))
            same.sort(key=lambda i: (lengths[i], requests[i].args[0]))
            rows = [more - lengths[i] for i in same]
            batches += self._cut([[i] for i in same], rows, self._written_bytes(), most=WRITTEN)

        def ask(groups: Sequence[Group]) -> dict[int, str]:
            self._lm.batch_size_per_gpu = len(groups)
            asked = [i for group in groups for i in group]
            return dict(zip(asked, self._lm.generate_until([requests[i] for i in asked], True), strict=True))

        return self._answers(batches, ask, len(requests))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Answers to (texts, tokens of the context, tokens of the continuation)."""
        rows: dict[tuple[int, ...], list[int]] = {}
        self._expect_known([*context, *continuation] for _, context, continuation in requests)
        for i, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise EvaluationError(f"an answer without a token cannot be scored: {texts!r:.200}; mend the task")
            rows.setdefault((*context, *continuation[:-1]), []).append(i)
        # as the harness orders them; of one row's requests it reads the longest continuation
        last = {row: max((requests[i][2] for i in group), key=len)[-1] for row, group in rows.items()}
        ordered = sorted(rows, key=lambda row: (-len(row), row, last[row]))
        batches = self._cut([rows[row] for row in ordered], [len(row) for row in ordered], self._read_bytes())

        def ask(groups: Sequence[Group]) -> dict[int, tuple[float, bool]]:
            self._lm.batch_size_per_gpu = len(groups)
            asked = [i for group in groups for i in group]
            return dict(zip(asked, self._ask_tokens([requests[i] for i in asked], disable_tqdm=True), strict=True))

        return self._answers(batches, ask, len(requests))

    def _expect_known(self, rows: Iterable[Sequence[int]]) -> None:
        if self._known is not None and (highest := max(map(max, filter(None, rows)), default=0)) >= self._known:
            raise EvaluationError(opening.unknown(highest, self._known))

    def _cut(
        self, groups: Sequence[Group], tokens: Sequence[int], token_bytes: int, *, most: int = 1
    ) -> list[list[Group]]:
        if self._rows:
            return cut(groups, tokens, rows=self._rows, room=0)
        kind = self._lm.device.type if self._lm.device.type in SHARE else "cpu"
        fits = int(SHARE[kind] * self._free_bytes) // token_bytes
        return cut(groups, tokens, rows=MOST_ROWS, room=max(1, min(fits, most * MOST_TOKENS[kind])))

    def _answers(
        self, batches: Sequence[list[Group]], ask: Callable[[Sequence[Group]], dict[int, Answer]], total: int
    ) -> list[Answer]:
        answers: dict[int, Answer] = {}
        self._parts = 1
        for batch in batches[processes.index() :: processes.count()]:
            answers |= self._fitting(batch, ask)
            if self.on_answered:
                self.on_answered(min(len(answers) * processes.count() / total, 1.0))
        for others in sharing.gathered(answers):
            answers |= others
        return [answers[i] for i in range(total)]

    def _fitting(self, batch: list[Group], ask: Callable[[Sequence[Group]], dict[int, Answer]]) -> dict[int, Answer]:
        """Answers to a batch, asked in ever smaller parts where it does not fit. Raises EvaluationError."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        answers: dict[int, Answer] = {}
        done = 0
        while done < len(batch):
            part = batch[done : done + max(1, len(batch) // self._parts)]
            try:
                answers |= ask(part)
                done += len(part)
                continue
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(part) == 1:
                    raise EvaluationError(
                        f"one row does not fit into the memory of {self._lm.device} beside the model "
                        f"({str(error):.80}); free some of it, or use a larger device"
                    ) from error
            clear_device_cache(garbage_collection=True)  # only here has the failed batch been let go
            self._parts *= 2
        return answers

    def _read_bytes(self) -> int:
        """What a token takes, roughly, while it is read: logits over the vocabulary, and its way through a layer."""
        config = self._lm.config.get_text_config()
        return int(_itemsize(self._lm) * (LOGITS * config.vocab_size + STATES * config.hidden_size))

    def _written_bytes(self) -> int:
        """What a token takes, roughly, while a text is written: its keys and values in every layer."""
        config = self._lm.config.get_text_config()
        return int(_itemsize(self._lm) * (2 * config.num_hidden_layers + STATES) * config.hidden_size)


def cut(groups: Sequence[Group], tokens: Sequence[int], *, rows: int, room: int) -> list[list[Group]]:
    """`groups`, longest first, in batches of at most `rows`, and of `room` tokens (0: any) when padded to the longest.

    `tokens` holds the length of each group's row. A batch has one row at least.
    """
    batches: list[list[Group]] = []
    longest = 0
    for group, length in zip(groups, tokens, strict=True):
        held = len(batches[-1]) if batches else rows
        if held >= rows or (room and (held + 1) * longest > room):
            batches.append([])
            longest = length
        batches[-1].append(group)
    return batches


def _itemsize(lm: Any) -> int:
    return int(next(lm.model.parameters()).element_size())


def _free_bytes(device: Any) -> int:
    """Memory free for batches on `device`, in this process's share of it."""
    if device.type == "cuda":
        import torch

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    import psutil

    return int(psutil.virtual_memory().available) // processes.count()
