"""Text as tokens: (context, continuation) pairs, tokenised as the harness does, and running text, packed in blocks.

The rules of pairs are those of lm-eval 0.4.13's HFLM (`loglikelihood`, `_encode_pair`, `tok_encode`,
`tok_batch_encode`), so that a patch is trained on the tokens it is evaluated with. They are implemented again here
because the embedded world is trained without importing the harness (seconds for each stage); tests compare them with
the harness itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from portllm.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

COLUMN = "text"
DOCUMENTS_AT_ONCE = 1000
IGNORED = -100  # label of a token that carries no loss
Example = dict[str, list[int]]
Pair = tuple[str, str]


class Generated(Pair):
    """A pair whose continuation is generated: its context stays as it is, trailing spaces included."""

    __slots__ = ()


@dataclass(frozen=True)
class Encoded:
    """Training examples (input_ids, labels: lists of equal length), and the numbers of rows that did not fit.

    `cut` rows lost the start of their context; `dropped` rows are left out: no answer, or one longer than the limit.
    """

    examples: tuple[Example, ...]
    cut: int
    dropped: int

    def notes(self, max_length: int) -> list[str]:
        """Return a line for people about each group of rows that did not fit."""
        rows = len(self.examples) + self.dropped
        cut = f"{self.cut} of {rows} rows are longer than {max_length} tokens: the start of their prompt is cut off"
        dropped = f"{self.dropped} of {rows} rows have no answer that fits in {max_length} tokens: left out"
        return [*([cut] if self.cut else []), *([dropped] if self.dropped else [])]


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int, *, eos: bool = True) -> Encoded:
    """Return (context, continuation) pairs as examples with loss on the continuation and the end token (`eos`) only.

    A row longer than `max_length` tokens loses the start of its context, as in the harness (`cut`); one whose
    continuation alone does not fit, or is empty, is left out (`dropped`). Raises DataError where none is left.
    """
    closing = [_end(tokenizer)] if eos else []
    examples, cut = [], 0
    for given, answer in tokenise(tokenizer, pairs):
        # a chat template may have added the end token
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
    """Return the (context, continuation) token ids that the harness's HFLM passes to the model for each pair."""
    moved = [_without_closing_spaces(pair) for pair in pairs]
    contexts = _ids(tokenizer, [context for context, _ in moved])
    # both are tokenised together, as in the harness
    wholes = _ids(tokenizer, [context + continuation for context, continuation in moved])
    ids = []
    for pair, (_, continuation), given, whole in zip(pairs, moved, contexts, wholes, strict=True):
        if not pair[0] or not given:
            ids.append(_without_context(tokenizer, continuation))
        elif isinstance(pair, Generated) and whole[: len(given)] != given:
            # generation starts from the context's own tokens, even where the answer would change the last of them
            ids.append((given, _plain(tokenizer, continuation)))
        else:
            ids.append((given, whole[len(given) :]))
    return ids


def _without_closing_spaces(pair: Pair) -> Pair:
    """Move trailing spaces of the context to the continuation, unless it is generated."""
    context, continuation = pair
    kept = context if isinstance(pair, Generated) else context.rstrip()
    return kept, context[len(kept) :] + continuation


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids with the tokenizer's special tokens, unless a text (of a chat template) has the first."""
    first = _prefix_text(tokenizer)
    ids: dict[bool, list[list[int]]] = {}
    has_first = [bool(first) and text.startswith(first) for text in texts]
    for group in set(has_first):
        chosen = [text for text, has in zip(texts, has_first, strict=True) if has == group]
        ids[group] = tokenizer(chosen, add_special_tokens=not group)["input_ids"]
    taken = {group: iter(rows) for group, rows in ids.items()}
    return [list(next(taken[has])) for has in has_first]


def _without_context(tokenizer: PreTrainedTokenizerBase, continuation: str) -> tuple[list[int], list[int]]:
    """Return the pair with a special token as context: the tokenizer's start of text, else its end of text."""
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


# --- running text, packed ---


@dataclass(frozen=True, eq=False)
class Blocks(Sequence[Example]):
    """Training examples (input_ids = labels) of `tokens`, int32 (blocks, block length), each made on access.

    They contain `documents` documents; `dropped` tokens at the end did not fill a block.
    """

    tokens: NDArray[Any]
    documents: int
    dropped: int

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        block: list[int] = self.tokens[index].tolist()
        return {"input_ids": block, "labels": block}


def pack(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], block_length: int) -> Blocks:
    """Concatenate texts, each with the tokenizer's BOS (if any) and an EOS, and split them into blocks.

    The last, short block is left out, and its tokens counted. Raises DataError where the texts do not fill one block,
    or the tokenizer has no EOS: a model trained on documents without an end does not learn to stop.
    """
    import numpy

    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the base's tokenizer has no eos_token, expected one to end each document; set it, try again")
    arrays, documents = [], 0
    for batch in _batches(texts):
        rows = tokenizer(batch, add_special_tokens=True)["input_ids"]
        # some tokenizers add the end token themselves
        closed = [row if row and row[-1] == end else [*row, end] for row in rows]
        arrays.append(numpy.fromiter((token for row in closed for token in row), numpy.int32))
        documents += len(batch)
    stream = numpy.concatenate(arrays) if arrays else numpy.empty(0, numpy.int32)
    used = len(stream) - len(stream) % block_length
    if not used:
        raise DataError(
            f"the corpus has {len(stream)} tokens, expected at least one block of {block_length}; give more text"
        )
    return Blocks(stream[:used].reshape(-1, block_length), documents, len(stream) - used)


def read_texts(path: Path) -> Iterator[str]:
    """Yield the column `text` of a parquet file, row by row, in bounded memory. Raises DataError naming the row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = 0
    try:
        with pq.ParquetFile(path) as file:
            if COLUMN not in file.schema_arrow.names:
                found = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path}: lacks the column {COLUMN}; expected {COLUMN}, found {found}")
            for batch in file.iter_batches(DOCUMENTS_AT_ONCE, columns=[COLUMN]):
                texts = batch.column(0).to_pylist()
                for row, text in enumerate(texts, start=done + 1):
                    if not isinstance(text, str):
                        raise DataError(
                            f"{path}: row {row} of {COLUMN} is {text!r:.40}, expected text; correct the file"
                        )
                    yield text
                done += len(texts)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); make it with `portllm prepare`") from error


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == DOCUMENTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
