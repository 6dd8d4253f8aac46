"""What this machine has: processor, memory, CUDA devices, disk, packages. Quick: neither torch nor CUDA is started."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess  # noqa: S404 - one fixed command, nvidia-smi
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from portllm.errors import ParamsError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "bitsandbytes", "flash-attn")
QUERY = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap")
FIRST_WITH_BF16 = 8.0  # compute capability (CUDA C++ programming guide, "Arithmetic Instructions")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CPU_BANDWIDTH = 20e9
# makers' data sheets: dense bf16 (fp16 where there is none) FLOP/s, bytes/s of memory, largest memory in GB; names
# that begin alike: the longer first
GPUS = (
    ("H200", 989e12, 4.8e12, 141), ("H100 PCIe", 756e12, 2.0e12, 80), ("H100", 989e12, 3.35e12, 80),
    ("H800", 989e12, 3.35e12, 80), ("B200", 2250e12, 8.0e12, 180), ("A100", 312e12, 1.9e12, 80),
    ("A800", 312e12, 1.9e12, 80), ("L40S", 362e12, 0.86e12, 48), ("L40", 181e12, 0.86e12, 48),
    ("L4", 121e12, 0.3e12, 24), ("A6000", 155e12, 0.77e12, 48), ("A40", 150e12, 0.7e12, 48),
    ("A10", 125e12, 0.6e12, 24), ("4090", 165e12, 1.0e12, 24), ("3090", 71e12, 0.94e12, 24),
    ("V100", 125e12, 0.9e12, 32), ("T4", 65e12, 0.3e12, 16),
)  # fmt: skip
WITHOUT_BF16 = ("V100", "T4")
UNKNOWN_GPU = (100e12, 0.6e12)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device; peak FLOP/s and bytes/s are its maker's (`known`), or a modest guess."""

    name: str
    memory_bytes: int
    free_bytes: int
    bf16: bool
    flops_per_second: float
    memory_bytes_per_second: float
    known: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All that bears on whether an experiment can run here. `torch_cuda`: the CUDA that torch was built with."""

    cpu: str
    cores: int
    ram_bytes: int
    ram_available_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    packages: dict[str, str | None]
    torch_cuda: str | None


def inspect(folder: Path) -> Machine:
    """This machine, with the disk that `folder` lies on."""
    import psutil

    memory = psutil.virtual_memory()
    limit = min([memory.total, *_cgroup_limits()])
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        ram_bytes=limit,
        ram_available_bytes=min(memory.available, limit),
        disk_free_bytes=shutil.disk_usage(_existing(folder)).free,
        gpus=tuple(_gpus()),
        packages={name: _version(name) for name in PACKAGES},
        torch_cuda=_torch_cuda(),
    )


def imagined(gpu: str) -> Gpu:
    """The device of that name (`H100`, `A100:40` with its GB) as its maker describes it. Raises ParamsError."""
    name, _, gigabytes = gpu.partition(":")
    found = next((row for row in GPUS if row[0].lower() == name.strip().lower()), None)
    if found is None or (gigabytes and not gigabytes.isdecimal()):
        known = ", ".join(row[0] for row in GPUS)
        raise ParamsError(f"{gpu}: expected NAME or NAME:GIGABYTES with a name out of {known}")
    key, flops, rate, largest = found
    nbytes = int(gigabytes or largest) * 10**9
    return Gpu(
        name=key, memory_bytes=nbytes, free_bytes=nbytes, bf16=key not in WITHOUT_BF16, flops_per_second=flops,
        memory_bytes_per_second=rate, known=True,
    )  # fmt: skip


def cpu_flops_per_second(seconds: float = 0.06) -> float:
    """float32 FLOP/s of all cores: one's, by the quickest matrix product of those that fit into so much time."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    size = 512
    square = np.ones((size, size), dtype=np.float32)
    quickest, start = float("inf"), time.perf_counter()
    with threadpool_limits(1):  # threads of a busy machine wait for one another
        while time.perf_counter() - start < seconds:
            before = time.perf_counter()
            square @ square
            quickest = min(quickest, time.perf_counter() - before)
    return len(os.sched_getaffinity(0)) * 2.0 * size**3 / quickest


def shares_blocks(folder: Path) -> bool:
    """Whether the DVC project of `folder` links its files to its cache, so that nothing lies on the disk twice."""
    config = _dvc_config(folder)
    kinds = re.search(r"^\s*type\s*=\s*(.+)$", config, re.MULTILINE)
    return kinds is not None and any(kind.strip() in ("hardlink", "symlink") for kind in kinds[1].split(","))


def _dvc_config(folder: Path) -> str:
    for parent in (folder.absolute(), *folder.absolute().parents):
        file = parent / ".dvc" / "config"
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    return ""


def _gpus() -> Iterator[Gpu]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    for line in _nvidia_smi().splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(QUERY):
            continue
        index, uuid, name, total, free, capability = cells
        if chosen is not None and index not in chosen and not any(uuid.startswith(c) for c in chosen):
            continue
        found = next(((flops, rate) for key, flops, rate, _ in GPUS if _is_called(key, name)), None)
        flops, rate = found or UNKNOWN_GPU
        with contextlib.suppress(ValueError):  # a device in an odd mode tells no numbers
            yield Gpu(
                name=name,
                memory_bytes=int(float(total) * 2**20),
                free_bytes=int(float(free) * 2**20),
                bf16=float(capability) >= FIRST_WITH_BF16,
                flops_per_second=flops,
                memory_bytes_per_second=rate,
                known=found is not None,
            )


def _is_called(key: str, name: str) -> bool:
    """Whether a device's name has `key` as a word: an RTX A4000 is no A40, a GH200 or GB200 is an H200 or B200."""
    return re.search(rf"\bG?{re.escape(key)}\b" if key.endswith("200") else rf"\b{re.escape(key)}\b", name) is not None


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    words = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _torch_cuda() -> str | None:
    # torch/version.py says it; importing torch takes seconds
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return os.uname().machine


def _cgroup_limits() -> Iterator[int]:
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            yield int(Path(file).read_text(encoding="ascii"))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
