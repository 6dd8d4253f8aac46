"""Encoding: the tokens the harness feeds, loss where it belongs, nothing lost in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from portllm.errors import DataError
from portllm.lm.data import encoding
from portllm.lm.learning import llama
from portllm.params import ArchitectureParams
from portllm.world import tokenizer

PAIRS = [
    ("The school opens at nine.\nAnswer:", " yes"),
    ("Answer:", " no"),
    ("Question: has Anna 5 coins?\nAnswer:", " 5 - 2 = 3"),
]
TEXTS = ["the cat sat on the mat .", "a dog is not a cat", "Question: is it? Answer: yes no maybe", "x  y   z\n\n1 2 3"]


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer.build()


def byte_level(**special: Any) -> Any:
    """As GPT-2, Qwen: bytes, nothing added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return trained(made, trainers, special, alphabet=pre_tokenizers.ByteLevel.alphabet())


def spaces_as_letters(*, first: bool, **special: Any) -> Any:
    """As SentencePiece, in Llama 2, Mistral and Gemma: a space is a letter of the word behind it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581")] if first else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Replace("\u2581", " ")
    return trained(made, trainers, special, alphabet=list("\n.:?,_"))


def trained(made: Any, trainers: Any, special: dict[str, Any], *, alphabet: list[str]) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    bos = special.pop("add_bos", False)
    names = ["<unk>", *special.values()]
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    )
    if bos:
        token = special["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, made.token_to_id(token))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


STYLES: dict[str, Callable[[], Any]] = {
    "qwen": lambda: byte_level(eos_token="<|endoftext|>"),
    "llama3": lambda: byte_level(bos_token="<|begin|>", eos_token="<|end|>", add_bos=True),
    "llama2": lambda: spaces_as_letters(first=True, bos_token="<s>", eos_token="</s>", add_bos=True),
    "gemma": lambda: spaces_as_letters(first=False, bos_token="<bos>", eos_token="<eos>", add_bos=True),
    "no bos": lambda: spaces_as_letters(first=True, bos_token="<s>", eos_token="</s>"),
}
ASKED = [
    ("the cat sat\nAnswer:", " yes"),
    ("the cat sat. Answer: ", "no"),
    ("a dog is  \n", " not a cat"),
    ("is it?", "maybe"),
    ("   ", "cat"),
    ("", " yes no"),
    ("", "yes"),
    ("{bos}the cat", " sat"),
    ("", "{bos} is"),
    ("a dog", "gy  is"),
]


def harness(words: Any) -> Any:
    model = llama.new_llama(words, ArchitectureParams(hidden_size=8, intermediate_size=8, layers=1, heads=1), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=model, tokenizer=words)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_tokens_are_those_the_harness_compares(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance

    words = STYLES[style]()
    first = words.bos_token or words.eos_token
    pairs = [tuple(text.format(bos=first) for text in pair) for pair in ASKED]
    if not words("")["input_ids"]:
        pairs = [pair for pair in pairs if pair[0].strip() or not pair[0]]  # the harness stops at spaces alone
    fed: list[Any] = []
    asked = harness(words)
    monkeypatch.setattr(asked, "_loglikelihood_tokens", lambda requests, **_: fed.extend(requests))
    asked.loglikelihood([Instance("loglikelihood", {}, pair, 0, ("t", 0, 1)) for pair in pairs], disable_tqdm=True)
    assert encoding.tokenise(words, pairs) == [(given, said) for _, given, said in fed]


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_a_generated_answer_follows_the_tokens_the_harness_generates_from(style: str) -> None:
    words = STYLES[style]()
    asked = harness(words)
    for context, answer in [("the cat sat\nAnswer:", " yes"), ("Answer: ", "no"), ("Answer:\n", "the cat\n")]:
        (given, said), *_ = encoding.tokenise(words, [encoding.Generated((context, answer))])
        assert given == asked.tok_batch_encode([context])[0][0].tolist()
        assert words.decode(said).strip() == answer.strip()


def test_the_beginning_of_text_is_not_added_twice() -> None:
    words = STYLES["llama3"]()
    for context in ("the cat", "<|begin|>the cat"):
        ((given, _),) = encoding.tokenise(words, [(context, " sat")])
        assert given.count(words.bos_token_id) == 1


def test_loss_is_on_the_answer_and_the_end_only(words: Any) -> None:
    encoded = encoding.encode(words, PAIRS, max_length=32)
    assert (encoded.cut, encoded.dropped) == (0, 0)
    for (prompt, answer), example in zip(PAIRS, encoded.examples, strict=True):
        kept = [label for label in example["labels"] if label != encoding.IGNORED]
        assert kept == [*words(answer)["input_ids"], words.eos_token_id]
        assert example["input_ids"] == words(prompt)["input_ids"] + kept
        assert len(example["labels"]) == len(example["input_ids"])


def test_the_end_is_added_once_and_only_where_wanted(words: Any) -> None:
    (closed,) = encoding.encode(words, [("Answer:", " yes </s>")], 32).examples
    (open_,) = encoding.encode(words, [("Answer:", " yes")], 32, eos=False).examples
    assert closed["input_ids"].count(words.eos_token_id) == 1
    assert closed["input_ids"] == [*open_["input_ids"], words.eos_token_id]


def test_rows_too_long_are_cut_at_the_start_or_dropped_and_counted(words: Any) -> None:
    encoded = encoding.encode(words, PAIRS, max_length=5)
    assert (encoded.cut, encoded.dropped) == (1, 1)
    assert encoded.notes(5) == [
        "1 of 3 rows are longer than 5 tokens: the start of their prompt is cut off",
        "1 of 3 rows have no answer that fits in 5 tokens: left out",
    ]
    assert encoding.encode(words, PAIRS, max_length=32).notes(32) == []
    assert all(len(example["input_ids"]) <= 5 for example in encoded.examples)
    assert words.decode(encoded.examples[0]["input_ids"]) == ". Answer : yes </s>"
    assert encoding.encode(words, [*PAIRS, ("Answer:", "")], 32).dropped == 1, "an empty answer teaches nothing"
    with pytest.raises(DataError, match="max_length"):
        encoding.encode(words, PAIRS, max_length=2)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    words = byte_level(bos_token="<s>")
    with pytest.raises(DataError, match="eos_token"):
        encoding.encode(words, [("a", "b")], 32)
