"""The world's tokenizer: one token a word, and what is read back is what was said."""

from __future__ import annotations

from pathlib import Path

from portllm.world import phrases, tokenizer


def test_text_is_cut_as_the_world_counts_words() -> None:
    words = tokenizer.build()
    text = "Question: Anna has 5 coins. Anna loses 2 of them.\nAnswer: 5 - 2 = 3\n#### 3"
    assert words.tokenize(text) == phrases.split(text)
    assert words.decode(words(text)["input_ids"]).endswith("Answer : 5 - 2 = 3 #### 3")


def test_every_word_of_the_vocabulary_is_one_token_of_its_own() -> None:
    words = tokenizer.build()
    ids = words(" ".join(phrases.vocabulary()))["input_ids"]
    assert len(ids) == len(set(ids)) == len(words) - 3
    assert words.unk_token_id not in ids


def test_a_word_the_world_never_says_is_unknown() -> None:
    words = tokenizer.build()
    assert words("zeppelin")["input_ids"] == [words.unk_token_id]


def test_it_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = tokenizer.build()
    words.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "The school opens at nine."
    assert again(text)["input_ids"] == words(text)["input_ids"]
    assert (again.pad_token, again.eos_token, again.model_max_length) == ("<pad>", "</s>", tokenizer.MAX_LENGTH)
