"""Packing: every document opened and closed as the tokenizer has it, nothing lost but a counted rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from portllm.errors import DataError
from portllm.lm.data import encoding
from portllm.lm.data.encoding import pack, read_texts
from portllm.lm.learning.words import byte_pairs

TEXTS = ["one text", "a second text", "", "and a third"]


@pytest.fixture(scope="module")
def plain() -> Any:
    return byte_pairs(TEXTS, 262, 64)


def with_bos(*, closing: bool) -> Any:
    """A tokenizer that opens texts with <pad>, and perhaps closes them, as Llama's opens them with <s>."""
    from tokenizers import processors

    made = byte_pairs(TEXTS, 262, 64)
    single = "<pad> $A </s>" if closing else "<pad> $A"
    processor = processors.TemplateProcessing(single=single, special_tokens=[("<pad>", 0), ("</s>", 1)])
    made.backend_tokenizer.post_processor = processor
    made.bos_token = "<pad>"
    return made


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize(("opened", "closing"), [(False, False), (True, False), (True, True)])
def test_documents_are_opened_and_closed_once(
    plain: Any, monkeypatch: pytest.MonkeyPatch, batch: int, opened: bool, closing: bool
) -> None:
    monkeypatch.setattr(encoding, "DOCUMENTS_AT_ONCE", batch)
    words = with_bos(closing=closing) if opened else plain
    stream = [i for text in TEXTS for i in [*[0] * opened, *plain(text)["input_ids"], 1]]
    blocks = pack(words, iter(TEXTS), 4)
    assert [token for block in blocks for token in block["input_ids"]] == stream[: len(stream) // 4 * 4]
    assert (blocks.documents, blocks.dropped) == (4, len(stream) % 4)
    assert all(block["labels"] == block["input_ids"] and len(block["labels"]) == 4 for block in blocks)
    assert blocks[1:3] == list(blocks)[1:3]


def test_too_little_text_and_no_end_are_refused(plain: Any) -> None:
    with pytest.raises(DataError, match="expected at least one block of 64; give more text"):
        pack(plain, TEXTS, 64)
    with pytest.raises(DataError, match="has 0 tokens"):
        pack(plain, [], 4)
    endless = byte_pairs(TEXTS, 262, 64)
    endless.eos_token = None
    with pytest.raises(DataError, match="no eos_token"):
        pack(endless, TEXTS, 4)


def test_texts_are_read_in_order_or_refused_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "DOCUMENTS_AT_ONCE", 2)
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3, 4]}), file)
    assert list(read_texts(file)) == TEXTS
    pq.write_table(pa.table({"text": ["a", "b", "c", None]}), file)
    with pytest.raises(DataError, match="row 4 of text is None"):
        list(read_texts(file))
    pq.write_table(pa.table({"words": TEXTS}), file)
    with pytest.raises(DataError, match="lacks the column text; expected text, found words"):
        list(read_texts(file))
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_texts(file))
    with pytest.raises(DataError, match="portllm prepare"):
        list(read_texts(tmp_path / "absent.parquet"))
