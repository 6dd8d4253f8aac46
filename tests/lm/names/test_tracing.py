"""A Traced array is rearranged as torch rearranges the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from portllm.lm.names.tracing import Traced, UntraceableError

Array = Any  # a torch.Tensor or a Traced: the functions under test take both


def draw_step(draw: st.DrawFn, ndim: int, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """One of the operations, for an array of this shape: from one array to one."""
    dim, other = draw(st.integers(0, ndim - 1)), draw(st.integers(0, ndim - 1))
    pieces, kept = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    cut = draw(st.integers(0, shape[dim]))

    def halves(x: Array) -> list[Array]:
        return [piece for piece in torch.split(x, [cut, shape[dim] - cut], dim=dim) if piece.shape[dim]]

    steps: list[Callable[[Array], Array]] = [
        lambda x: torch.transpose(x, dim0=dim, dim1=other),
        lambda x: (parts := torch.chunk(x, pieces, dim=dim))[kept % len(parts)],
        lambda x: torch.split(x, pieces, dim=dim - ndim)[0],
        lambda x: torch.cat(halves(x)[::-1], dim=dim),
        lambda x: torch.stack(torch.chunk(x, pieces, dim=dim)[:1], dim=other).contiguous(),
        lambda x: torch.stack([x], dim=dim).squeeze(dim),
    ]
    return draw(st.sampled_from(steps))


def assembled(array: Traced, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    value = torch.full(array.shape, -1)
    for part in array.parts():
        at = tuple(i if isinstance(i, int) else slice(*i) for i in part.at)
        block = tensors[part.tensor][tuple(slice(*span) for span in part.of)]
        assert (value[at] == -1).all()
        value[at] = block.mT if part.transposed else block
    return value


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_traced_operations_equal_torchs(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    count = data.draw(st.integers(1, 3))
    size = int(torch.tensor(shape).prod())
    tensors = {f"t{i}": torch.arange(i * size, (i + 1) * size).reshape(shape) for i in range(count)}
    join = data.draw(st.sampled_from([torch.stack, torch.cat]))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    true, traced = join(list(tensors.values()), dim=dim), join([Traced.whole(k, shape) for k in tensors], dim=dim)
    for _ in range(data.draw(st.integers(0, 4))):
        step = data.draw(st.composite(draw_step)(true.ndim, tuple(true.shape)))
        true, traced = step(true), step(traced)
        assert traced.shape == tuple(true.shape)
    try:
        found = assembled(traced, tensors)
    except UntraceableError:
        assume(False)
    assert torch.equal(found, true)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: torch.reshape(x, (4, 3)),
        lambda x: torch.permute(x, (1, 0)),
        lambda x: torch.add(x, 1),
        lambda x: torch.where(x > 0, x, x),
        lambda x: x.reshape(4, 3),
        lambda x: x.to(torch.float32),
        lambda x: torch.cat([x, Traced.whole("other", (2, 2))]),
        lambda x: torch.split(x, [1, 1]),
        lambda x: torch.chunk(torch.stack([x]), 3, dim=1)[0].squeeze(1),
    ],
)
def test_any_other_operation_is_an_error(step: Callable[[Traced], object]) -> None:
    with pytest.raises((UntraceableError, AttributeError, TypeError)):
        step(Traced.whole("t", (3, 4)))


def test_only_the_last_two_axes_may_be_swapped() -> None:
    turned = torch.transpose(Traced.whole("t", (2, 3, 4)), 0, 1)
    with pytest.raises(UntraceableError):
        turned.parts()
    (part,) = torch.transpose(Traced.whole("t", (2, 3, 4)), 1, 2).parts()
    assert part.transposed
    assert part.at == ((0, 2), (0, 4), (0, 3))
    assert part.of == ((0, 2), (0, 3), (0, 4))
