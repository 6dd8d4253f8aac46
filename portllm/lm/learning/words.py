"""A tokenizer of our own for text of any kind: byte pairs learnt from the corpus.

Byte-pair encoding: Sennrich et al., arXiv:1508.07909; on bytes, as in GPT-2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from portllm.errors import ParamsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "</s>"
BYTES = 256


def byte_pairs(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, the same for the same texts.

    Any text can be written with it and comes back byte for byte. Every digit is a token of its own, so that numbers are
    read and written digit by digit. `</s>` ends documents and answers; no special token is added by itself.
    Raises ParamsError where the 256 bytes alone do not fit.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, END]
    if vocab_size < BYTES + len(special):
        raise ParamsError(
            f"fetch.vocab_size is {vocab_size}, expected at least {BYTES + len(special)}: a token for every byte, "
            f"{' and '.join(special)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
