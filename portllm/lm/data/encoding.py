"""Text to tokens: (context, continuation) pairs, cut as the harness cuts them.

The rules are those of lm-eval 0.4.13's HFLM (`loglikelihood`, `_encode_pair`, `tok_encode`, `tok_batch_encode`), so
that a patch is trained on the very tokens it is asked with. They are stated again here because the embedded world is
trained without importing the harness (seconds for each stage); the tests let the harness itself say what it feeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from portllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that carries no loss
Example = dict[str, list[int]]
Pair = tuple[str, str]


class Generated(Pair):
    """A pair whose continuation is generated: its context is fed as it stands, closing spaces included."""

    __slots__ = ()


@dataclass(frozen=True)
class Encoded:
    """Training examples (input_ids, labels: lists of equal length), and how many rows did not fit as they are.

    `cut` rows lost the start of their context; `dropped` rows are left out: no answer, or one longer than the limit.
    """

    examples: tuple[Example, ...]
    cut: int
    dropped: int

    def notes(self, max_length: int) -> list[str]:
        """What a user should know of the rows that did not fit, a line each."""
        rows = len(self.examples) + self.dropped
        cut = f"{self.cut} of {rows} rows are longer than {max_length} tokens: the start of their prompt is cut off"
        dropped = f"{self.dropped} of {rows} rows have no answer that fits in {max_length} tokens: left out"
        return [*([cut] if self.cut else []), *([dropped] if self.dropped else [])]


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int, *, eos: bool = True) -> Encoded:
    """(context, continuation) pairs as examples with loss on the continuation and the end token (`eos`) only.

    A row longer than `max_length` tokens loses the start of its context, as in the harness (`cut`); one whose
    continuation alone does not fit, or is empty, is left out (`dropped`). Raises DataError when none is left.
    """
    closing = [_end(tokenizer)] if eos else []
    examples, cut = [], 0
    for given, answer in tokenise(tokenizer, pairs):
        # a chat template may have closed the answer itself
        target = answer if answer[-1:] == closing else [*answer, *closing]
        room = max_length - len(target)
        if not answer or room < 1:
            continue
        cut += len(given) > room
        kept = given[-room:]
        examples.append({"input_ids": kept + target, "labels": [IGNORED] * len(kept) + target})
    if not examples:
        raise DataError(f"none of {len(pairs)} rows has an answer that fits in {max_length} tokens; raise max_length")
    return Encoded(tuple(examples), cut, len(pairs) - len(examples))


def tokenise(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """The (context, continuation) token ids the harness's HFLM feeds for each pair."""
    moved = [_without_closing_spaces(pair) for pair in pairs]
    contexts = _ids(tokenizer, [context for context, _ in moved])
    # both are cut into tokens together, as the harness does
    wholes = _ids(tokenizer, [context + continuation for context, continuation in moved])
    ids = []
    for pair, (_, continuation), given, whole in zip(pairs, moved, contexts, wholes, strict=True):
        if not pair[0] or not given:
            ids.append(_without_context(tokenizer, continuation))
        elif isinstance(pair, Generated) and whole[: len(given)] != given:
            # generation starts from the context's own tokens, also where the answer would have changed the last of them
            ids.append((given, _plain(tokenizer, continuation)))
        else:
            ids.append((given, whole[len(given) :]))
    return ids


def _without_closing_spaces(pair: Pair) -> Pair:
    """The spaces that close a context begin the continuation instead; not so where it is generated."""
    context, continuation = pair
    kept = context if isinstance(pair, Generated) else context.rstrip()
    return kept, context[len(kept) :] + continuation


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids with the tokenizer's own special tokens, unless a text (of a chat template) brings the first along."""
    first = _prefix_text(tokenizer)
    ids: dict[bool, list[list[int]]] = {}
    brings = [bool(first) and text.startswith(first) for text in texts]
    for group in set(brings):
        chosen = [text for text, brought in zip(texts, brings, strict=True) if brought == group]
        ids[group] = tokenizer(chosen, add_special_tokens=not group)["input_ids"]
    taken = {group: iter(found) for group, found in ids.items()}
    return [list(next(taken[brought])) for brought in brings]


def _without_context(tokenizer: PreTrainedTokenizerBase, continuation: str) -> tuple[list[int], list[int]]:
    """The beginning of text, or its end where the tokenizer has none, stands for an empty context."""
    ids, prefix = _plain(tokenizer, continuation), _prefix(tokenizer)
    return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    return _end(tokenizer) if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def _prefix_text(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([_prefix(tokenizer)]))


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)
