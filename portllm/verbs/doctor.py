"""doctor: what an experiment will need, stage by stage, and whether this machine has it. Nothing is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from portllm.errors import CheckpointError, DataError, MachineError, PortllmError
from portllm.lm.data import columns, corpora, sources, stock
from portllm.lm.sizing import equipment, launches, models, needs
from portllm.lm.sizing.equipment import Machine
from portllm.lm.sizing.models import Model
from portllm.lm.sizing.needs import Need, Pace
from portllm.params import Params
from portllm.world import datasets

GPU_UTILISATION, CPU_UTILISATION = 0.35, 0.4
# past this a run is not worth starting without asking the user again
PATIENCE_HOURS = 24 * 14
ROOM_BYTES = 2**30  # for what no formula counts: results, logs, tracking
# the process without its model: libraries, CUDA's context
OWN_BYTES = 2**30
LARGE_PARAMETERS = 500_000_000


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must be right, or is worth knowing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is needed and what is there. Bytes on disk count what DVC's cache keeps a second time."""

    models: Mapping[str, Model]
    stages: tuple[Need, ...]
    disk_bytes: int
    network_bytes: int
    memory_bytes: int
    hours: float
    device: str
    machine: Machine
    checks: tuple[Check, ...]
    assumptions: tuple[str, ...]

    @property
    def able(self) -> bool:
        """Whether nothing speaks against running it here."""
        return all(check.status != "fail" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"ok": self.able, **dataclasses.asdict(self)}


def run(*, params: Params | None, folder: Path = Path(), as_if: str | None = None) -> Diagnosis:
    """Estimate `params` (None: look at the machine only), to run in `folder`.

    `as_if` puts a GPU by that name into this machine. Raises ParamsError where it is not known.
    """
    machine = equipment.inspect(folder)
    if as_if is not None:
        machine = dataclasses.replace(machine, gpus=(equipment.imagined(as_if),), torch_cuda="as if")
    if params is None or not params.releases:
        return _of_machine(machine)
    found, troubles = _models(params)
    pace, assumed = _pace(params, machine)
    shapes = {release: model.shape for release, model in found.items() if model.shape is not None}
    stages = needs.estimate(params, shapes, pace) if len(shapes) == len(params.releases) else ()
    copies = 1 if equipment.shares_blocks(folder) else 2
    network = sum({m.name: m.network_bytes for m in found.values() if m.network_bytes}.values())
    diagnosis = Diagnosis(
        models=found,
        stages=stages,
        disk_bytes=copies * sum(stage.disk_bytes for stage in stages) + network,
        network_bytes=network,
        memory_bytes=max((stage.memory_bytes for stage in stages), default=0),
        hours=sum(stage.seconds for stage in stages) / 3600,
        device=machine.gpus[0].name if machine.gpus else machine.cpu,
        machine=machine,
        checks=(),
        assumptions=(*assumed, *needs.ASSUMED, _kept(copies)) if stages else (),
    )
    checks = (
        *troubles,
        *_data(params, folder),
        *_room(diagnosis, folder),
        *_power(diagnosis),
        *_software(params, machine),
        *_sharing(params, machine),
    )
    return dataclasses.replace(diagnosis, checks=checks)


def _of_machine(machine: Machine) -> Diagnosis:
    return Diagnosis(
        models={}, stages=(), disk_bytes=0, network_bytes=0, memory_bytes=0, hours=0.0,
        device=machine.gpus[0].name if machine.gpus else machine.cpu, machine=machine,
        checks=tuple(_devices(machine)), assumptions=(),
    )  # fmt: skip


def _models(params: Params) -> tuple[dict[str, Model], list[Check]]:
    """Each release's model, and what is wrong with where it comes from."""
    found: dict[str, Model] = {}
    troubles: list[Check] = []
    for release in params.releases:
        recipe = params.evolve.releases.get(release)
        source = params.fetch.source if release == params.releases[0] else recipe.source if recipe else None
        if source is None and recipe is not None:
            found[release] = dataclasses.replace(found[recipe.base], network_bytes=0)
            continue
        try:
            model = models.describe(source or "", params.fetch)
        except PortllmError as error:
            model = models.published(source or "")
            status: Literal["warn", "fail"] = "fail" if isinstance(error, CheckpointError) else "warn"
            troubles.append(Check(name="model", status=status, detail=str(error)))
        found[release] = model
        if model.shape is None:
            kind = f"{model.name}: no estimate, as its size is not known to portllm without loading it"
            troubles.append(Check(name="model", status="warn", detail=kind))
    return found, troubles


def _pace(params: Params, machine: Machine) -> tuple[Pace, tuple[str, ...]]:
    """The device's speed, and what is assumed of it."""
    precision = params.train.optim.precision
    if machine.gpus:
        gpu = machine.gpus[0]
        said = f"{gpu.name}: {GPU_UTILISATION:.0%} of {gpu.flops_per_second / 1e12:.0f} TFLOP/s"
        said += " (its maker's figure)" if gpu.known else " (a guess: the device is not in portllm's table)"
        size = 2 if gpu.bf16 and precision != "fp32" else 4
        pace = Pace(
            flops_per_second=gpu.flops_per_second, utilisation=GPU_UTILISATION,
            memory_bytes_per_second=gpu.memory_bytes_per_second, element_bytes=size,
        )  # fmt: skip
        return pace, (f"{said}, one device",)
    flops = equipment.cpu_flops_per_second()
    said = f"this processor: {CPU_UTILISATION:.0%} of {flops / 1e9:.0f} GFLOP/s, measured just now"
    pace = Pace(
        flops_per_second=flops, utilisation=CPU_UTILISATION,
        memory_bytes_per_second=equipment.CPU_BANDWIDTH, element_bytes=2 if precision == "bf16" else 4,
    )  # fmt: skip
    return pace, (said,)


def _data(params: Params, folder: Path) -> Iterator[Check]:
    """Tasks and corpora that are not on this machine come from the hub, where they are known or can be its own."""
    here = folder / params.prepare.data
    asked = []
    for kind, name, known in _named(params):
        try:
            if sources.here(here, name):
                continue
        except DataError as error:
            yield Check(name="data", status="fail", detail=str(error))
            continue
        if known():
            asked.append(name)
        else:
            said = f"{name}: neither in {params.prepare.data} nor {kind}; put its files there, or mend its name"
            yield Check(name="data", status="fail", detail=said)
    recipes = params.evolve.releases.values()
    released = (params.fetch.source, *(recipe.source for recipe in recipes if recipe.source))
    if asked or any("/" in name and not Path(name).is_dir() for name in released):
        yield _hub(params, asked)


def _named(params: Params) -> Iterator[tuple[str, str, Callable[[], bool]]]:
    """Each task and corpus that is not the embedded world's: what it has to be, its name, whether it is that."""
    for task in dict.fromkeys(params.tasks):
        if task not in datasets.TASKS:
            yield "a task of the harness", task, partial(_is_task, task)
    parts = (part for c in params.prepare.corpora.values() for part in c.source.split(corpora.JOINED))
    for part in dict.fromkeys(parts):
        yield "a known corpus nor a dataset of the hub (OWNER/NAME)", part, partial(_is_corpus, part)


def _is_task(name: str) -> bool:
    return name in columns.SEVEN or stock.find(name) is not None


def _is_corpus(name: str) -> bool:
    return name in corpora.KNOWN or "/" in name


def _hub(params: Params, asked: Sequence[str]) -> Check:
    from huggingface_hub import constants, get_token

    token = "a token is there" if get_token() else "no token (`hf auth login`, for gated models)"
    said = f"{', '.join(asked)} come from it, unless put under {params.prepare.data}; {token}" if asked else token
    if constants.HF_HUB_OFFLINE:
        offline = f"switched off (HF_HUB_OFFLINE), so its cache must have all; {said}"
        return Check(name="hub", status="warn", detail=offline)
    return Check(name="hub", status="ok", detail=said)


def _kept(copies: int) -> str:
    if copies == 1:
        return "DVC's cache links what it keeps (cache.type), so that nothing lies on the disk twice"
    return "DVC's cache keeps a second copy; `dvc config cache.type reflink,hardlink,copy` spares it"


def _room(diagnosis: Diagnosis, folder: Path) -> Iterator[Check]:
    if not diagnosis.stages:
        return
    there = _size(folder / "models")
    wanted = max(0, diagnosis.disk_bytes - there) + ROOM_BYTES
    free = diagnosis.machine.disk_free_bytes
    said = f"{_gb(wanted)} wanted, {_gb(free)} free"
    if wanted > free:
        said += "; free some, or put the project on another disk"
    yield Check(name="disk", status="ok" if wanted <= free else "fail", detail=said)


def _power(diagnosis: Diagnosis) -> Iterator[Check]:
    yield from _devices(diagnosis.machine)
    if not diagnosis.stages:
        return
    machine, wanted = diagnosis.machine, diagnosis.memory_bytes
    has = machine.gpus[0].memory_bytes if machine.gpus else machine.ram_bytes
    free = machine.gpus[0].free_bytes if machine.gpus else machine.ram_available_bytes
    wanted += OWN_BYTES
    stage = max(diagnosis.stages, key=lambda s: s.memory_bytes).stage
    where = "GPU memory" if machine.gpus else "memory"
    said = f"{_gb(wanted)} of {where} wanted at most (by {stage}), {_gb(has)} there, {_gb(free)} free now"
    status: Literal["ok", "warn", "fail"] = "ok"
    if wanted > has:
        status = "fail"
        said += (
            "; try train.quantization: 4bit, gradient_checkpointing, a smaller batch_size with gradient_accumulation, "
        )
        said += "or several devices by accelerate launch with configs/accelerate"
    elif wanted > free:
        status = "warn"
    yield Check(name="memory", status=status, detail=said)
    yield _patience(diagnosis)


def _patience(diagnosis: Diagnosis) -> Check:
    said = f"about {_hours(diagnosis.hours)} on {diagnosis.device}"
    if diagnosis.hours > PATIENCE_HOURS:
        advice = "take a GPU" if not diagnosis.machine.gpus else "take more or faster GPUs, or fewer tasks and releases"
        return Check(name="time", status="fail", detail=f"{said}, more than {_hours(PATIENCE_HOURS)}; {advice}")
    return Check(name="time", status="ok", detail=said)


def _devices(machine: Machine) -> Iterator[Check]:
    if machine.gpus and machine.torch_cuda is None:
        yield Check(
            name="device", status="fail",
            detail=f"{machine.gpus[0].name} is there, but torch {machine.packages['torch']} has no CUDA; "
            "install the CUDA build of the same version",
        )  # fmt: skip
        return
    for gpu in machine.gpus:
        short = "" if gpu.bf16 else ", no bf16: it computes in float32"
        yield Check(
            name="device", status="ok" if gpu.bf16 else "warn", detail=f"{gpu.name}, {_gb(gpu.memory_bytes)}{short}"
        )
    if len(machine.gpus) > 1:
        said = f"the pipeline takes one device, or all by {launches.ENVIRONMENT}=FILE (see configs/accelerate)"
        yield Check(name="device", status="ok", detail=said)
    if not machine.gpus:
        yield Check(name="device", status="ok", detail=f"no CUDA device; {machine.cores} cores of {machine.cpu}")


def _software(params: Params, machine: Machine) -> Iterator[Check]:
    if params.train.quantization == "4bit" and machine.packages["bitsandbytes"] is None:
        yield Check(name="bitsandbytes", status="fail", detail="train.quantization is 4bit; pip install bitsandbytes")
    attentions = {params.train.optim.attention, params.evolve.optim.attention}
    if "flash_attention_2" in attentions and machine.packages["flash-attn"] is None:
        yield Check(name="flash-attn", status="fail", detail="optim.attention asks for it; install flash-attn, or sdpa")


def _sharing(params: Params, machine: Machine) -> Iterator[Check]:
    """Several processes share a step's rows evenly, or training refuses after everything has been fetched."""
    if not (config := os.environ.get(launches.ENVIRONMENT)):
        return
    try:
        count = launches.processes(Path(config), lambda: len(machine.gpus))
    except MachineError as error:
        yield Check(name="launch", status="fail", detail=str(error))
        return
    uneven = {name: rows for name, rows in _batches(params) if rows % count}
    if not uneven:
        yield Check(name="launch", status="ok", detail=f"{count} processes ({launches.ENVIRONMENT})")
    for name, rows in uneven.items():
        fitting = ", ".join(str(n) for n in range(1, count) if rows % n == 0)
        yield Check(
            name="launch", status="fail",
            detail=f"{name} is {rows}, which the {count} processes of {launches.ENVIRONMENT} cannot share evenly; "
            f"show them fewer GPUs (CUDA_VISIBLE_DEVICES; {fitting} would do), or set num_processes",
        )  # fmt: skip


def _batches(params: Params) -> Iterator[tuple[str, int]]:
    """Rows of one step, all processes together, of everything that is trained."""
    if params.fetch.source in (models.WORLD, models.SCRATCH):
        yield "fetch.optim.batch_size", params.fetch.optim.batch_size
    if any(params.evolve.releases[release].source is None for release in params.releases[1:]):
        yield "evolve.optim.batch_size", params.evolve.optim.batch_size
    for task in params.tasks:
        own = "batch_size" in params.train.per_task[task].optim if task in params.train.per_task else False
        name = f"train.per_task.{task}.optim.batch_size" if own else "train.optim.batch_size"
        yield name, params.train.for_task(task).optim.batch_size


def _size(folder: Path) -> int:
    sizes = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in sizes)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


def _hours(hours: float) -> str:
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.0f} h" if hours < 96 else f"{hours / 24:,.0f} days"
