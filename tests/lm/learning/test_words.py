"""Byte pairs: any text comes back as it was, the same texts give the same tokenizer, digits stand alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from portllm.errors import ParamsError
from portllm.lm.learning.words import byte_pairs

TEXTS = ["the cat sat on the mat", "the hat is on the cat", "12 cats and 340 hats"] * 20
TOTAL = 256 + 2 + 12


def test_any_text_comes_back() -> None:
    tokenizer = byte_pairs(TEXTS, TOTAL, 32)
    assert len(tokenizer) == TOTAL
    for text in ("the cat", "  two  spaces\n\tand a tab ", "Größe 漢字 \U0001f642", "12+345=7", "<|x|>", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_is_frequent_is_one_token_and_digits_are_single() -> None:
    tokenizer = byte_pairs(TEXTS, TOTAL, 32)
    assert len(tokenizer(" the")["input_ids"]) == 1
    assert len(tokenizer("340")["input_ids"]) == 3
    assert tokenizer("</s>")["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.bos_token_id is None
    assert tokenizer.model_max_length == 32


def test_the_same_texts_give_the_same_tokenizer_in_another_process() -> None:
    code = (
        "from portllm.lm.learning.words import byte_pairs; "
        f"print(byte_pairs({TEXTS!r}, {TOTAL}, 32).backend_tokenizer.to_str())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"TOKENIZERS_PARALLELISM": "0"}
    )
    assert other.stdout.strip() == byte_pairs(TEXTS, TOTAL, 32).backend_tokenizer.to_str()


def test_a_vocabulary_without_all_bytes_is_refused() -> None:
    with pytest.raises(ParamsError, match="expected at least 258"):
        byte_pairs(TEXTS, 257, 32)
