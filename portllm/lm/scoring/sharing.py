"""Values exchanged between the processes of one job; one process alone needs no torch for it.

All processes must make the same calls in the same order, or they wait for each other permanently.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

from portllm import processes

Value = TypeVar("Value")

LONGEST_WAIT = timedelta(weeks=4)


def device() -> Any:
    """Return where this process computes (torch.device): on a GPU of its own, where there are any."""
    import torch

    if processes.count() > 1:
        return _state().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def from_main(value: Value) -> Value:
    """Return the main process's `value`."""
    if processes.count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    values: list[Value] = broadcast_object_list([value])
    return values[0]


def gathered(value: Value) -> list[Value]:
    """Return the `value` of each process, in the order of their numbers."""
    if processes.count() == 1:
        return [value]
    from accelerate.utils import gather_object

    _state()
    return list(gather_object([value]))


def _state() -> Any:
    """Return this process's state; the first call joins the others, each of which may be waited for at any length."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=cpu, timeout=LONGEST_WAIT)
