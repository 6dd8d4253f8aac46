"""The world's tokenizer: one word, one token; one vocabulary for every release."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm.world import phrases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MAX_LENGTH = 128


def build() -> PreTrainedTokenizerFast:
    """Return the tokenizer: a token is a word or a run of signs; white space is not encoded.

    `</s>` ends documents and answers; decoded text has spaces between all tokens. The vocabulary consists of the
    phrases and word lists that documents and rows are made of, so that none of them contains `<unk>`. No special token
    is added automatically.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((PAD, END, UNKNOWN, *phrases.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
