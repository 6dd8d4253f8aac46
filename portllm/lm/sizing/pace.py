"""How fast a device computes, measured on the spot: a matrix product and a copy, timed for a moment.

Nothing is estimated from a maker's figures: where no measurement was possible there is no pace, and no hours are said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# what a step takes however small its batch: 180 kernels of 6 µs a layer
STEP_SECONDS, LAYER_STEP_SECONDS = 0.005, 0.0011
# the share of the measured product's speed that training is taken to reach
GPU_UTILISATION, CPU_UTILISATION = 0.35, 0.4
PRODUCT_SIZES = {"cpu": 512, "cuda": 4096}
COPIED_BYTES = {"cpu": 2**25, "cuda": 2**28}
SECONDS = 0.06  # of one measurement


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The measured speed of a device: FLOP/s of a matrix product, the share training reaches, bytes/s of memory."""

    flops_per_second: float
    utilisation: float
    memory_bytes_per_second: float

    def step_seconds(self, flops: float, layers: int, passes: float) -> float:
        """Return the seconds of one step of `passes` forwards: of computing, or of starting kernels if that is more."""
        computing = flops / (self.flops_per_second * self.utilisation)
        return max(computing, STEP_SECONDS + layers * LAYER_STEP_SECONDS * passes / 3)


def cpu_pace() -> Pace:
    """Measure this processor in float32: one core's product times the number of cores, and one core's copy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of a busy machine wait for one another
    try:
        return _measure("cpu", torch.float32, CPU_UTILISATION, len(os.sched_getaffinity(0)), lambda: None)
    finally:
        torch.set_num_threads(before)


def gpu_pace(element_bytes: int) -> Pace | None:
    """Measure the first CUDA device in bfloat16 (2 bytes an element) or float32; None where it cannot be used now."""
    import torch

    try:
        if not torch.cuda.is_available():
            return None
        dtype = torch.bfloat16 if element_bytes == 2 else torch.float32
        return _measure("cuda", dtype, GPU_UTILISATION, 1, torch.cuda.synchronize)
    except RuntimeError:  # no memory left beside other processes, or a driver that torch cannot use
        return None


def _measure(device: str, dtype: Any, utilisation: float, units: int, wait: Callable[[], object]) -> Pace:
    """Time a product and a copy on `device`; `wait` returns when its kernels have ended, `units` compute at once."""
    import torch

    size, nbytes = PRODUCT_SIZES[device], COPIED_BYTES[device]
    square = torch.ones((size, size), dtype=dtype, device=device)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_seconds = _shortest(lambda: torch.mm(square, square), wait)
    copy_seconds = _shortest(lambda: target.copy_(source), wait)
    return Pace(
        flops_per_second=units * 2.0 * size**3 / product_seconds,
        utilisation=utilisation,
        memory_bytes_per_second=2.0 * nbytes / copy_seconds,  # read and written
    )


def _shortest(work: Callable[[], object], wait: Callable[[], object]) -> float:
    """Return the seconds of the fastest of the runs of `work` that fit into SECONDS; the first run is not timed."""
    work()
    wait()
    shortest, start = float("inf"), time.perf_counter()
    while shortest == float("inf") or time.perf_counter() - start < SECONDS:
        before = time.perf_counter()
        work()
        wait()
        shortest = min(shortest, time.perf_counter() - before)
    return shortest
