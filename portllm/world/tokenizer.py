"""The world's tokenizer: one word, one token; one vocabulary for every release."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portllm.world import phrases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MAX_LENGTH = 128


def build() -> PreTrainedTokenizerFast:
    """Words and runs of signs are tokens, white space is dropped; `</s>` ends documents and answers;
    what is decoded has spaces between all tokens.

    Nothing the world says is `<unk>`: the vocabulary is gathered from the very phrases and word lists
    that documents and rows are made of. No special token is added by itself.
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
