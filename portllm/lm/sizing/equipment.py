"""Inspect this machine: processor, memory, CUDA devices, disk, packages, and the processes that accelerate will start.

Fast: neither torch nor CUDA is initialised.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess  # noqa: S404 - one fixed command, nvidia-smi
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from portllm.errors import MachineError, ParamsError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "bitsandbytes", "flash-attn")
QUERY = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap")
FIRST_WITH_BF16 = 8.0  # compute capability (CUDA C++ programming guide, "Arithmetic Instructions")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# for --as-if: the largest memory in GB that a device of that name is sold with
GPUS = {
    "B200": 180, "H200": 141, "H100": 80, "H800": 80, "A100": 80, "A800": 80, "L40S": 48, "L40": 48, "A6000": 48,
    "A40": 48, "V100": 32, "L4": 24, "A10": 24, "4090": 24, "3090": 24, "T4": 16,
}  # fmt: skip
WITHOUT_BF16 = ("V100", "T4")
# names an accelerate configuration for every training stage, so that one dvc.yaml uses all GPUs of any machine
ENVIRONMENT = "PORTLLM_ACCELERATE"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device, and whether it computes in bfloat16."""

    name: str
    memory_bytes: int
    free_bytes: int
    bf16: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides whether an experiment can run here. `torch_cuda` is the CUDA version that torch was built with."""

    cpu: str
    cores: int
    ram_bytes: int
    ram_available_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    packages: dict[str, str | None]
    torch_cuda: str | None


def inspect(folder: Path) -> Machine:
    """Return this machine, with the disk that contains `folder`."""
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
    """Return the device of that name (`H100`, `A100:40` with its memory in GB). Raises ParamsError."""
    name, _, gigabytes = gpu.partition(":")
    key = next((key for key in GPUS if key.lower() == name.strip().lower()), None)
    if key is None or (gigabytes and not gigabytes.isdecimal()):
        raise ParamsError(f"{gpu}: expected NAME or NAME:GIGABYTES with a name out of {', '.join(GPUS)}")
    nbytes = int(gigabytes or GPUS[key]) * 10**9
    return Gpu(name=key, memory_bytes=nbytes, free_bytes=nbytes, bf16=key not in WITHOUT_BF16)


def shares_blocks(folder: Path) -> bool:
    """Return whether the DVC project of `folder` links its files to its cache: each byte is on the disk once."""
    config = _dvc_config(folder)
    kinds = re.search(r"^\s*type\s*=\s*(.+)$", config, re.MULTILINE)
    return kinds is not None and any(kind.strip() in ("hardlink", "symlink") for kind in kinds[1].split(","))


def processes(config: Path, count_gpus: Callable[[], int]) -> int:
    """Return the number of processes that an accelerate configuration starts, over all machines together.

    On one machine, at most one per GPU. Raises MachineError.
    """
    import yaml

    try:
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
        wanted, machines, on_cpu = int(tree["num_processes"]), int(tree["num_machines"]), bool(tree["use_cpu"])
    except OSError as error:
        raise MachineError(
            f"{config}: expected an accelerate configuration, found {error.strerror}; see configs/accelerate"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise MachineError(
            f"{config}: expected an accelerate configuration with num_processes, num_machines and use_cpu, found "
            f"another file ({' '.join(str(error).split())[:200]}); see configs/accelerate"
        ) from error
    if on_cpu:
        return wanted
    if not (gpus := count_gpus()):
        raise MachineError(
            f"{config}: needs GPUs, and this machine has none that torch can use; try configs/accelerate/cpu-2"
        )
    return wanted if machines > 1 else min(wanted, gpus)


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
        with contextlib.suppress(ValueError):  # a device in some modes reports no numbers
            yield Gpu(
                name=name,
                memory_bytes=int(float(total) * 2**20),
                free_bytes=int(float(free) * 2**20),
                bf16=float(capability) >= FIRST_WITH_BF16,
            )


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
    # torch/version.py contains it; importing torch takes seconds
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


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
