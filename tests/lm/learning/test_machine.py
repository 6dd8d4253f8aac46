"""What training took: sums, highs and means, as a dictionary and as a line."""

from __future__ import annotations

import time

import pytest
import torch

from portllm.lm.learning import machine


def test_a_busy_block_is_busy_and_an_idle_one_is_not() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        idle, busy = machine.CostMeter(), machine.CostMeter()
        with idle.running():
            time.sleep(0.2)
        with busy.running():
            until = time.process_time() + 0.2
            while time.process_time() < until:
                pass
    finally:
        torch.set_num_threads(before)
    resting, working = idle.figures(1000, 800), busy.figures(1000, 800)
    assert resting["cpu_utilisation"] < 0.3 * 0.2 / max(resting["train_seconds"], 0.2) + 0.1
    assert working["cpu_utilisation"] > resting["cpu_utilisation"]
    for figures in (resting, working):
        assert figures["train_seconds"] >= 0.2
        assert figures["tokens_per_second"] == pytest.approx(1000 / figures["train_seconds"])
        assert figures["useful_tokens_per_second"] == pytest.approx(800 / figures["train_seconds"])
        assert figures["processes"] == 1


def test_peak_memory_counts_what_was_held_once() -> None:
    before = machine.peak_rss_bytes()
    block = torch.ones(1 << 26)  # 256 MB
    held = machine.peak_rss_bytes()
    del block
    assert held > 2e8
    assert machine.peak_rss_bytes() >= held >= before


def test_the_line_names_what_there_is() -> None:
    figures = {
        "train_seconds": 12.34, "tokens_per_second": 4500.4, "useful_tokens_per_second": 4100.0,
        "cpu_utilisation": 0.98, "train_peak_rss_bytes": 512e6, "processes": 1.0,
    }  # fmt: skip
    assert machine.usage(figures) == "12.3 s, 4,500 tokens/s (4,100 without padding), CPU 98%, 512 MB"
    more = {**figures, "processes": 8.0, "peak_cuda_bytes": 21e9, "gpu_utilisation": 0.93}
    assert machine.usage(more).endswith("512 MB, GPU 93%, 21.00 GB on the GPU, 8 processes")


@pytest.mark.parametrize("answer", [50, ModuleNotFoundError("pynvml"), AttributeError("NVMLError_NotSupported")])
def test_it_is_this_process_s_gpu_that_is_looked_at(answer: int | Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NVML refuses is left out of the figures, and says nothing."""
    asked: list[object] = []

    def utilization(device: object = None) -> int:
        asked.append(device)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(machine, "SAMPLE_SECONDS", 0.01)
    for name, value in {"is_available": True, "current_device": 3, "max_memory_allocated": 7}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: None)
    monkeypatch.setattr("torch.cuda.utilization", utilization)
    meter = machine.CostMeter()
    with meter.running():
        time.sleep(0.1)
    assert set(asked) == {3}
    assert meter.figures(1, 1).get("gpu_utilisation") == (0.5 if answer == 50 else None)
