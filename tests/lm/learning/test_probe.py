"""The base probe: an answer counts only when it is, token for token, what the model would say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from portllm.lm.learning.probe import known
from portllm.world import tokenizer


class Successor(torch.nn.Module):
    """After token t, says t + 1."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids + 1, 600).float())


def test_known_counts_greedy_continuations() -> None:
    words = tokenizer.build()

    def said(*ids: int) -> str:
        return words.decode(ids)

    right, long, wrong, half = (
        (said(20, 21), said(22)),
        (said(30), said(31, 32, 33)),
        (said(20, 21), said(23)),
        (said(30), said(31, 33)),
    )
    model = Successor().train()
    assert known(model, words, [right, long]) == 1.0
    assert known(model, words, [right, wrong]) == 0.5
    assert known(model, words, [right, long, wrong, half] * 40) == 0.5
    assert model.training


def test_nothing_asked_is_nothing_known() -> None:
    assert known(Successor(), tokenizer.build(), []) == pytest.approx(0.0)
