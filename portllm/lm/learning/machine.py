"""The machine that trains: what a training costs (for costs, never for records), its threads, its refusals."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.errors import MachineError
from portllm.lm.learning.loading import computes_in

if TYPE_CHECKING:
    from accelerate import Accelerator

    from portllm.params import OptimParams

SAMPLE_SECONDS = 1.0
# the others stand still while the main process writes a snapshot: 84 GB for all weights of a 7B model
TIMEOUT = timedelta(minutes=30)


class CostMeter:
    """Measures a block of work on this process; `figures` combines the figures of all processes."""

    def __init__(self) -> None:
        self._gpu_samples: list[float] = []
        self._seconds = self._cpu_seconds = 0.0
        self._threads = 1
        self._device = -1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measure the block inside."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._threads = torch.get_num_threads()
        done = threading.Event()
        sampler = threading.Thread(target=self._sample, args=(done,), daemon=True, name="gpu-utilisation")
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else -1
        started_at, cpu_at = time.perf_counter(), time.process_time()
        if torch.cuda.is_available():
            sampler.start()
        try:
            yield
        finally:
            done.set()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds = time.perf_counter() - started_at
            self._cpu_seconds = time.process_time() - cpu_at

    def figures(self, tokens: int, useful: int) -> dict[str, float]:
        """Return the block's cost over all processes: a sum for tokens, the highest for memory, a mean for utilisation.

        Keys: train_seconds, tokens_per_second (all that were computed), useful_tokens_per_second (no padding),
        train_peak_rss_bytes, peak_cuda_bytes, cpu_utilisation (CPU seconds by wall seconds and threads),
        gpu_utilisation (share of the time in which a kernel ran, where NVML says so), processes.
        """
        import torch

        cuda = torch.cuda.is_available()
        utilisation = self._cpu_seconds / max(self._seconds * self._threads, 1e-9)
        gpu = sum(self._gpu_samples) / len(self._gpu_samples) if self._gpu_samples else -1.0
        peak_cuda = torch.cuda.max_memory_allocated() if cuda else 0
        own = [float(tokens), float(useful), self._seconds, utilisation, gpu, float(peak_rss_bytes()), float(peak_cuda)]
        every = _everywhere(own)
        seconds = max(max(row[2] for row in every), 1e-9)
        figures = {
            "train_seconds": seconds,
            "tokens_per_second": sum(row[0] for row in every) / seconds,
            "useful_tokens_per_second": sum(row[1] for row in every) / seconds,
            "cpu_utilisation": sum(row[3] for row in every) / len(every),
            "train_peak_rss_bytes": int(max(row[5] for row in every)),
            "processes": len(every),
        }
        if cuda:
            figures["peak_cuda_bytes"] = int(max(row[6] for row in every))
        if gpus := [row[4] for row in every if row[4] >= 0]:
            figures["gpu_utilisation"] = sum(gpus) / len(gpus)
        return figures

    def _sample(self, done: threading.Event) -> None:
        import torch

        while not done.wait(SAMPLE_SECONDS):
            try:
                self._gpu_samples.append(torch.cuda.utilization(self._device) / 100)
            except Exception:  # no NVML, or one that refuses: the figure is left out, training continues
                return


def peak_rss_bytes() -> int:
    """Return the most memory this process has held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def usage(figures: dict[str, Any]) -> str:
    """Return one line for people: `12.3 s, 4,500 tokens/s (4,100 without padding), CPU 98%, 512 MB`."""
    parts = [
        f"{figures['train_seconds']:.1f} s, {figures['tokens_per_second']:,.0f} tokens/s "
        f"({figures['useful_tokens_per_second']:,.0f} without padding)",
        f"CPU {figures['cpu_utilisation']:.0%}, {figures['train_peak_rss_bytes'] / 1e6:,.0f} MB",
    ]
    if "peak_cuda_bytes" in figures:
        busy = f"GPU {figures['gpu_utilisation']:.0%}, " if "gpu_utilisation" in figures else ""
        parts.append(f"{busy}{figures['peak_cuda_bytes'] / 1e9:.2f} GB on the GPU")
    if figures["processes"] > 1:
        parts.append(f"{figures['processes']:.0f} processes")
    return ", ".join(parts)


def accelerator_for(optim: OptimParams) -> Accelerator:
    """Return accelerate's view of processes and devices. Raises MachineError for strategies that cannot be saved."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

    bf16 = computes_in(optim.precision) == "bf16"
    accelerator = Accelerator(
        mixed_precision="no",  # the loop casts: accelerate's setting cannot change in the life of a process
        cpu=not torch.cuda.is_available() and (bf16 or processes.count() > 1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=False),
            InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
    )
    kind = accelerator.distributed_type
    is_sharded = kind == DistributedType.FSDP
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (is_sharded and not accelerator.is_fsdp2):
        raise MachineError(
            f"accelerate's configuration: expected replicas or FSDP with fsdp_version: 2, found {kind.value}; "
            "begin with one of configs/accelerate"
        )
    if is_sharded:
        accelerator.state.fsdp_plugin.set_mixed_precision("bf16" if bf16 else "fp32", override=True)
    return accelerator


@contextlib.contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Run with `count` threads (0: as many as there are now): another number rounds sums in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Raise MachineError, with what to do, for too little memory on a GPU and for the end of another process."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the GPU's memory is too small for this training; lower optim.batch_size and raise "
            "optim.gradient_accumulation, set optim.gradient_checkpointing, or train.quantization: 4bit"
        ) from error
    except RuntimeError as error:
        if processes.count() == 1:
            raise
        line = " ".join(str(error).split())[:200]
        raise MachineError(f"training stopped, perhaps because another process ended ({line})") from error


def _everywhere(row: list[float]) -> list[list[float]]:
    """Return the rows of all processes."""
    if processes.count() == 1:
        return [row]
    import torch
    from torch import distributed

    device = f"cuda:{os.environ['LOCAL_RANK']}" if distributed.get_backend() == "nccl" else "cpu"
    own = torch.tensor(row, dtype=torch.float64, device=device)
    every = [torch.empty_like(own) for _ in range(processes.count())]
    distributed.all_gather(every, own)
    return [one.tolist() for one in every]
