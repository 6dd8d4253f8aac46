"""Batches: whatever their size, and however often they do not fit, every request gets the answer the harness gives."""

from __future__ import annotations

import json
import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from portllm.errors import EvaluationError
from portllm.lm.learning import llama
from portllm.lm.scoring.language_model import BatchedLM, Group, cut, grouped, rows_at_once
from portllm.params import ArchitectureParams
from portllm.world import tokenizer

SHAPE = ArchitectureParams(hidden_size=16, intermediate_size=16, layers=2, heads=2, max_positions=16)
KINDS = ["loglikelihood", "loglikelihood_rolling", "generate_until"]
Loaded = tuple[Any, Any]
Requests = dict[str, list[Any]]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    words = tokenizer.build()
    return llama.new_llama(words, SHAPE, seed=0).eval(), words


@pytest.fixture(scope="module")
def requests(loaded: Loaded) -> Requests:
    """Requests of all three kinds, in no order, some of them twice, some of one context, some too long."""
    rng = random.Random(0)
    vocabulary = sorted(loaded[1].get_vocab())
    texts = [" ".join(rng.sample(vocabulary, rng.randint(1, 12))) for _ in range(20)]
    choices = [(text, f" {word}") for text in texts for word in rng.sample(vocabulary, 2)]
    choices += [(texts[0], f" {texts[1]}"), ("", texts[2]), (f"{texts[3]} ", texts[4])]
    rng.shuffle(choices)
    short = {"until": ["."], "do_sample": False, "max_gen_toks": 4}
    written = [(text, short if i % 3 else {**short, "max_gen_toks": 2}) for i, text in enumerate(texts)]
    long = [" ".join(rng.sample(vocabulary, 50)) for _ in range(3)]
    by_kind = {
        "loglikelihood": [*choices, choices[3]],
        "loglikelihood_rolling": [(text,) for text in [*texts, *long, texts[5]]],
        "generate_until": written,
    }
    return {
        kind: [SimpleNamespace(args=args, doc_id=i) for i, args in enumerate(all_)] for kind, all_ in by_kind.items()
    }


def batched(loaded: Loaded, rows: int) -> BatchedLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        return BatchedLM(*loaded, rows=rows)


def flat(answers: Any) -> list[Any]:
    return [value for one in answers for value in (one if isinstance(one, tuple) else [one])]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_the_harness_s_own_in_batches_of_the_same_size(
    loaded: Loaded, requests: Requests, kind: str
) -> None:
    from lm_eval.models.huggingface import HFLM

    short = [request for request in requests[kind] if len(request.args[0].split()) < SHAPE.max_positions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4)
    assert getattr(batched(loaded, 4), kind)(short) == getattr(plain, kind)(short)


def test_the_windows_of_long_texts_equal_the_harness_s(loaded: Loaded, requests: Requests) -> None:
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4)
    texts = requests["loglikelihood_rolling"]
    ours = batched(loaded, 4)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(plain.loglikelihood_rolling(texts), abs=1e-4)
    assert max(len(ours.tok_encode(request.args[0])) for request in texts) > 2 * ours.max_length


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_batch_is_of_no_consequence(loaded: Loaded, requests: Requests, kind: str) -> None:
    one, found = (flat(getattr(batched(loaded, rows), kind)(requests[kind])) for rows in (1, 0))
    assert one == (found if kind == "generate_until" else pytest.approx(found, abs=1e-4))


@pytest.mark.parametrize("kind", KINDS)
def test_no_bar_of_the_harness_is_drawn(
    loaded: Loaded, requests: Requests, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    getattr(batched(loaded, 4), kind)(requests[kind])
    assert "requests" not in capsys.readouterr().err


class Refusing:
    """Refuses to read more than `most` rows at once, as a device without memory does."""

    def __init__(self, model: Any, most: int, error: RuntimeError) -> None:
        self.most, self.error, self.sizes = most, error, list[int]()
        self.handle = model.get_input_embeddings().register_forward_pre_hook(self.read)

    def read(self, _: Any, args: tuple[torch.Tensor]) -> None:
        self.sizes.append(len(args[0]))
        if self.sizes[-1] > self.most:
            raise self.error

    def __enter__(self) -> Refusing:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_read_in_smaller_batches(loaded: Loaded, requests: Requests, kind: str) -> None:
    expected = flat(getattr(batched(loaded, 1), kind)(requests[kind]))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with Refusing(loaded[0], 3, error) as device:
        answers = flat(getattr(batched(loaded, 0), kind)(requests[kind]))
    assert answers == (expected if kind == "generate_until" else pytest.approx(expected, abs=1e-4))
    refused = [size for size in device.sizes if size > 3]
    assert 0 < len(refused) <= 10, "after a refusal, later batches are small from the start"


def test_a_row_that_never_fits_is_an_error(loaded: Loaded, requests: Requests) -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 GiB")
    with Refusing(loaded[0], 0, error), pytest.raises(EvaluationError, match=r"one row does not fit.*larger device"):
        batched(loaded, 0).loglikelihood(requests["loglikelihood"])


def test_any_other_failure_is_not_taken_for_a_lack_of_memory(loaded: Loaded, requests: Requests) -> None:
    with Refusing(loaded[0], 0, RuntimeError("shapes differ")), pytest.raises(RuntimeError, match="shapes differ"):
        batched(loaded, 0).loglikelihood(requests["loglikelihood"])


def test_an_answer_without_a_token_is_an_error(loaded: Loaded) -> None:
    with pytest.raises(EvaluationError, match=r"without a token cannot be scored.*Anna"):
        batched(loaded, 1).loglikelihood([SimpleNamespace(args=("Anna", ""), doc_id=0)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_the_model_does_not_have_is_an_error(requests: Requests, kind: str) -> None:
    words = tokenizer.build()
    small = llama.new_llama(words, SHAPE, seed=0).eval()
    small.resize_token_embeddings(len(words) // 2)
    with pytest.raises(EvaluationError, match=f"of the text, the model has tokens 0 to {len(words) // 2 - 1}"):
        getattr(batched((small, words), 1), kind)(requests[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_are_no_answer(requests: Requests, kind: str) -> None:
    """issue 8, item 1: an argmax over NaN is token 0, and answer 0."""
    words = tokenizer.build()
    model = llama.new_llama(words, SHAPE, seed=0).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(EvaluationError, match=r"nan|NaN"):
        getattr(batched((model, words), 4), kind)(requests[kind])


def test_prompts_longer_than_the_context_are_counted_by_document(loaded: Loaded, requests: Requests) -> None:
    """issue 8, item 5."""
    lm = batched(loaded, 4)
    text = requests["loglikelihood"][0].args[0] or "the"
    word = next(iter(lm.tokenizer.get_vocab()))
    for tokens, cut_off in ((16, set()), (17, {7})):
        lm.truncated = set()
        context = " ".join([word] * tokens)
        length = len(lm.tok_encode(f"{context} {word}"))
        assert length == tokens + 1
        lm.loglikelihood([SimpleNamespace(args=(context, f" {word}"), doc_id=7) for _ in range(2)])
        assert lm.truncated == cut_off
    assert text
    settings = {"until": ["."], "do_sample": False, "max_new_tokens": 4}
    for tokens, cut_off in ((12, set()), (13, {3})):
        lm.truncated = set()
        lm.generate_until([SimpleNamespace(args=(" ".join([word] * tokens), settings), doc_id=3)])
        assert lm.truncated == cut_off


def test_progress_ends_with_everything(loaded: Loaded, requests: Requests) -> None:
    shares: list[float] = []
    lm = batched(loaded, 4)
    lm.on_answered = shares.append
    lm.loglikelihood(requests["loglikelihood"])
    assert shares == sorted(shares)
    assert len(shares) > 4
    assert shares[-1] == 1.0


def test_requests_are_left_as_they_are(loaded: Loaded, requests: Requests) -> None:
    before = json.dumps([request.args for request in requests["generate_until"]])
    batched(loaded, 4).generate_until(requests["generate_until"])
    assert json.dumps([request.args for request in requests["generate_until"]]) == before


def test_requests_of_one_row_are_one_group_and_the_longest_come_first() -> None:
    groups = grouped([([1], [2]), ([1, 2, 3], [4]), ([1], [3]), ([1, 2], [3, 5])])
    assert groups == [Group((1, 3), 3), Group((0, 2), 1)]


@pytest.mark.parametrize(("rows", "room"), [(1, 0), (3, 0), (100, 0), (100, 20), (3, 20), (5, 1)])
def test_a_cut_keeps_order_and_loses_nothing(rows: int, room: int) -> None:
    rng = random.Random(1)
    lengths = sorted((rng.randint(1, 30) for _ in range(50)), reverse=True)
    batches = cut([Group((i,), length) for i, length in enumerate(lengths)], rows=rows, room=room)
    assert [i for batch in batches for group in batch.groups for i in group.requests] == list(range(50))
    for batch in batches:
        assert len(batch.groups) == batch.rows <= rows
        assert batch.rows == 1 or not room or batch.rows * batch.groups[0].tokens <= room


def test_a_text_of_many_windows_is_read_a_batch_at_a_time() -> None:
    (long, rest) = cut([Group((0,), 16, rows=9), Group((1,), 16, rows=1)], rows=4, room=0)
    assert (long.rows, rows_at_once(long.groups, long.rows)) == (4, 4)
    assert rest.rows == 1
    both = [Group((0, 1), 3), Group((2,), 2)]
    assert rows_at_once(both, 2) == 3, "requests of one row are counted singly"


def test_only_public_names_of_the_harness_are_overridden(loaded: Loaded) -> None:
    """A private name of the harness may change its meaning with any of its versions."""
    from lm_eval.models.huggingface import HFLM

    own = {name for name in vars(BatchedLM) if not name.startswith("__") and name != "_abc_impl"}
    assert {name for name in own if hasattr(HFLM, name)} == {
        "model", "tok_encode", "loglikelihood", "loglikelihood_rolling", "generate_until",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=1)
    assert vars(plain).keys() & own == set()
    values = {name for name in vars(batched(loaded, 1)).keys() - vars(plain).keys() if hasattr(HFLM, name)}
    assert values == set()
