"""Batches: whatever their size, and however often they do not fit, every request gets the answer the harness gives."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from portllm.errors import EvaluationError
from portllm.lm.learning import llama
from portllm.lm.scoring.scorer import Scorer, cut
from portllm.params import ArchitectureParams
from portllm.world import tokenizer

SHAPE = ArchitectureParams(hidden_size=16, intermediate_size=16, layers=2, heads=2)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    words = tokenizer.build()
    return llama.new_llama(words, SHAPE, seed=0).eval(), words


@pytest.fixture(scope="module")
def asked(loaded: tuple[Any, Any]) -> dict[str, list[Any]]:
    """Requests of all three kinds, in no order, some of them twice, some of one context."""
    rng = random.Random(0)
    known = sorted(loaded[1].get_vocab())
    texts = [" ".join(rng.sample(known, rng.randint(1, 12))) for _ in range(20)]
    chosen = [(text, f" {word}") for text in texts for word in rng.sample(known, 2)] + [(texts[0], f" {texts[1]}")]
    rng.shuffle(chosen)
    short = {"until": ["."], "do_sample": False, "max_gen_toks": 4}
    written = [(text, short if i % 3 else {**short, "max_gen_toks": 2}) for i, text in enumerate(texts)]
    return {
        "loglikelihood": [SimpleNamespace(args=pair) for pair in [*chosen, chosen[3]]],
        "loglikelihood_rolling": [SimpleNamespace(args=(text,)) for text in texts],
        "generate_until": [SimpleNamespace(args=pair) for pair in written],
    }


def scorer(loaded: tuple[Any, Any], rows: int) -> Scorer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        return Scorer(*loaded, rows=rows)


def flat(answers: Any) -> list[Any]:
    return [value for one in answers for value in (one if isinstance(one, tuple) else [one])]


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_answers_equal_the_harness_s_own_in_batches_of_the_same_size(
    loaded: tuple[Any, Any], asked: dict[str, list[Any]], kind: str
) -> None:
    from lm_eval.models.huggingface import HFLM

    requests = asked[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4)
    plain.tokenizer.pad_token = plain.tokenizer.pad_token or plain.tokenizer.eos_token
    assert getattr(scorer(loaded, 4), kind)(requests) == getattr(plain, kind)(requests)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_the_size_of_a_batch_is_of_no_consequence(
    loaded: tuple[Any, Any], asked: dict[str, list[Any]], kind: str
) -> None:
    one, found = (flat(getattr(scorer(loaded, rows), kind)(asked[kind])) for rows in (1, 0))
    assert one == (found if kind == "generate_until" else pytest.approx(found, abs=1e-4))


def test_what_does_not_fit_is_asked_in_smaller_batches(loaded: tuple[Any, Any], asked: dict[str, list[Any]]) -> None:
    import torch

    small, sizes = scorer(loaded, 0), []
    inner = small._ask_tokens

    def refusing(requests: list[Any], **told: Any) -> Any:
        sizes.append(small._lm.batch_size_per_gpu)
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return inner(requests, **told)

    small._ask_tokens = refusing
    answers = small.loglikelihood(asked["loglikelihood"])
    assert flat(answers) == pytest.approx(flat(scorer(loaded, 1).loglikelihood(asked["loglikelihood"])), abs=1e-4)
    refused = [size for size in sizes if size > 3]
    assert len(refused) <= 5, "once told, later batches are small from the start"


def test_a_row_that_never_fits_is_an_error(loaded: tuple[Any, Any], asked: dict[str, list[Any]]) -> None:
    def refusing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 GiB")

    small = scorer(loaded, 0)
    small._ask_tokens = refusing
    with pytest.raises(EvaluationError, match=r"one row does not fit.*larger device"):
        small.loglikelihood(asked["loglikelihood"])


def test_any_other_failure_is_not_taken_for_a_lack_of_memory(
    loaded: tuple[Any, Any], asked: dict[str, list[Any]]
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes differ")

    broken = scorer(loaded, 0)
    broken._ask_tokens = failing
    with pytest.raises(RuntimeError, match="shapes differ"):
        broken.loglikelihood(asked["loglikelihood"])


def test_an_answer_without_a_token_is_said(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(EvaluationError, match=r"without a token cannot be scored.*Anna"):
        scorer(loaded, 1)._loglikelihood_tokens([(("Anna", ""), [5], [])])


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_a_token_that_the_model_does_not_know_is_said(asked: dict[str, list[Any]], kind: str) -> None:
    words = tokenizer.build()
    small = llama.new_llama(words, SHAPE, seed=0).eval()
    small.resize_token_embeddings(len(words) // 2)
    with pytest.raises(EvaluationError, match=f"of the text, the model knows 0 to {len(words) // 2 - 1}"):
        getattr(scorer((small, words), 1), kind)(asked[kind])


def test_progress_ends_at_the_whole(loaded: tuple[Any, Any], asked: dict[str, list[Any]]) -> None:
    shares: list[float] = []
    told = scorer(loaded, 4)
    told.on_answered = shares.append
    told.loglikelihood(asked["loglikelihood"])
    assert shares == sorted(shares)
    assert len(shares) > 4
    assert shares[-1] == 1.0


@pytest.mark.parametrize(("rows", "room"), [(1, 0), (3, 0), (100, 0), (100, 20), (3, 20), (5, 1)])
def test_a_cut_keeps_order_and_loses_nothing(rows: int, room: int) -> None:
    rng = random.Random(1)
    lengths = sorted((rng.randint(1, 30) for _ in range(50)), reverse=True)
    batches = cut([[i] for i in range(50)], lengths, rows=rows, room=room)
    assert [group[0] for batch in batches for group in batch] == list(range(50))
    for batch in batches:
        assert len(batch) <= rows
        assert len(batch) == 1 or not room or len(batch) * lengths[batch[0][0]] <= room
