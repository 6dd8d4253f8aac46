"""Running text as training examples: documents laid end to end and cut into blocks of one length."""

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

Example = dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class Blocks(Sequence[Example]):
    """Training examples (input_ids = labels) out of `tokens`, int32 (blocks, block length); made when asked for.

    `documents` went in; `dropped` tokens at the end did not fill a block.
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
    """Texts as the tokenizer opens them (its BOS, if any), each closed by EOS, end to end, in blocks.

    The last, short block is left out, and its tokens counted. Raises DataError when the texts do not fill one block,
    or when the tokenizer has no EOS: a model that reads documents without an end never learns to stop.
    """
    import numpy

    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the base's tokenizer has no eos_token, which must close each document; set one and try again")
    pieces, documents = [], 0
    for batch in _batches(texts):
        rows = tokenizer(batch, add_special_tokens=True)["input_ids"]
        # some tokenizers close a text themselves
        closed = [row if row and row[-1] == end else [*row, end] for row in rows]
        pieces.append(numpy.fromiter((token for row in closed for token in row), numpy.int32))
        documents += len(batch)
    stream = numpy.concatenate(pieces) if pieces else numpy.empty(0, numpy.int32)
    whole = len(stream) - len(stream) % block_length
    if not whole:
        raise DataError(f"the corpus has {len(stream)} tokens, one block takes {block_length}; give more text")
    return Blocks(stream[:whole].reshape(-1, block_length), documents, len(stream) - whole)


def read_texts(path: Path) -> Iterator[str]:
    """The column `text` of a parquet file, row by row, never all at once. Raises DataError naming what is wrong."""
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
                        raise DataError(f"{path}: row {row} of {COLUMN} is {text!r:.40}, expected text; mend the file")
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
