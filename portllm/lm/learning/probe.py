"""What a base knows before any patch is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 64


def known(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> float:
    """Share (0..1) of the (prompt, answer) pairs whose answer is the model's greedy continuation; 0 for no pairs.

    Every token of the answer must be the likeliest, given the prompt and the answer so far. The model is
    left in the mode (training or not) it came in.
    """
    import torch

    was_training = model.training
    model.eval()
    right = 0
    try:
        with torch.inference_mode():
            for start in range(0, len(pairs), _BATCH):
                right += _known_in(model, tokenizer, pairs[start : start + _BATCH])
    finally:
        model.train(was_training)
    return right / len(pairs) if pairs else 0.0


def _known_in(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> int:
    import torch

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = [ids(prompt) for prompt, _ in pairs]
    wholes = [ids(f"{prompt} {answer.lstrip()}") for prompt, answer in pairs]
    longest = max(map(len, wholes))
    # padding stands after the text, where causal attention does not look: no mask is needed
    padded = torch.tensor([whole + [0] * (longest - len(whole)) for whole in wholes], device=model.device)
    likeliest = model(input_ids=padded).logits.argmax(-1)
    return sum(
        likeliest[row, len(prompt) - 1 : len(whole) - 1].tolist() == whole[len(prompt) :]
        for row, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True))
    )
