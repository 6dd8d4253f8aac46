"""doctor: what an experiment will need, stage by stage, and whether this machine has it. No weights are loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from portllm.amounts import duration, size
from portllm.errors import CheckpointError, DataError, MachineError, PortllmError
from portllm.lm.data import columns, corpora, sources, stock
from portllm.lm.sizing import equipment, models, needs, pace
from portllm.lm.sizing.equipment import ENVIRONMENT, Machine
from portllm.lm.sizing.models import SourceModel
from portllm.lm.sizing.needs import Device, Need
from portllm.params import Params
from portllm.world import datasets

# a run that takes longer is not worth starting without asking the user again
PATIENCE_HOURS = 24 * 14
ROOM_BYTES = 2**30  # for what no formula counts: results, logs, tracking
# the process without its model: libraries, CUDA's context
OWN_BYTES = 2**30
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of the experiment: met, worth a note, or not met."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is needed and what is available. Bytes on disk count what DVC's cache keeps a second time.

    `hours` is None where no pace was measured, or a model's time is not estimated.
    """

    models: Mapping[str, SourceModel]
    stages: tuple[Need, ...]
    disk_bytes: int
    network_bytes: int
    memory_bytes: int
    hours: float | None
    device: str
    machine: Machine
    checks: tuple[Check, ...]
    assumptions: tuple[str, ...]

    @property
    def able(self) -> bool:
        """Return whether no check fails."""
        return all(check.status != "fail" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return all values as plain ones."""
        described = {release: model.as_json() for release, model in self.models.items()}
        return {"ok": self.able, **dataclasses.asdict(self), "models": described}


def run(*, params: Params | None, folder: Path = Path(), as_if: str | None = None) -> Diagnosis:
    """Estimate what `params` (None: only inspect the machine) need in `folder`.

    `as_if` puts a GPU of that name into this machine. Raises ParamsError for a name that is not in the table.
    """
    machine = equipment.inspect(folder)
    if as_if is not None:
        machine = dataclasses.replace(machine, gpus=(equipment.imagined(as_if),), torch_cuda="as if")
    if params is None or not params.releases:
        return _of_machine(machine)
    sources, problems = _models(params)
    device, assumed = _device(params, machine, is_here=as_if is None)
    sizes = {release: model.size for release, model in sources.items() if model.size is not None}
    stages = needs.estimate(params, sizes, device) if len(sizes) == len(params.releases) else ()
    copies = 1 if equipment.shares_blocks(folder) else 2
    network = sum({m.name: m.network_bytes for m in sources.values() if m.network_bytes}.values())
    seconds = needs.total_seconds(stage.seconds for stage in stages)
    diagnosis = Diagnosis(
        models=sources,
        stages=stages,
        disk_bytes=copies * sum(stage.disk_bytes for stage in stages) + network,
        network_bytes=network,
        memory_bytes=max((stage.memory_bytes for stage in stages), default=0),
        hours=None if seconds is None else seconds / 3600,
        device=_device_name(machine),
        machine=machine,
        checks=(),
        assumptions=(*assumed, *needs.ASSUMED, _kept(copies)) if stages else (),
    )
    checks = (
        *problems,
        *_targets(params, sources),
        *_data(params, folder),
        *_room(diagnosis, folder),
        *_devices(machine),
        *_power(diagnosis, device),
        *_software(params, machine),
        *_sharing(params, machine),
    )
    return dataclasses.replace(diagnosis, checks=checks)


def _of_machine(machine: Machine) -> Diagnosis:
    return Diagnosis(
        models={}, stages=(), disk_bytes=0, network_bytes=0, memory_bytes=0, hours=None, device=_device_name(machine),
        machine=machine, checks=tuple(_devices(machine)), assumptions=(),
    )  # fmt: skip


def _device_name(machine: Machine) -> str:
    return machine.gpus[0].name if machine.gpus else machine.cpu


def _models(params: Params) -> tuple[dict[str, SourceModel], list[Check]]:
    """Return each release's model, and the problems of their sources."""
    sources: dict[str, SourceModel] = {}
    problems: list[Check] = []
    for release in params.releases:
        recipe = params.evolve.releases.get(release)
        source = params.fetch.source if release == params.releases[0] else recipe.source if recipe else None
        if source is None and recipe is not None:
            sources[release] = dataclasses.replace(sources[recipe.base], network_bytes=0)
            continue
        try:
            model = models.describe(source or "", params.fetch)
        except PortllmError as error:
            model = models.published(source or "")
            status: Status = "fail" if isinstance(error, CheckpointError) else "warn"
            problems.append(Check(name="model", status=status, detail=str(error)))
        sources[release] = model
        if model.size is None:
            text = f"{model.name}: no estimate, as its size cannot be counted ({model.reason})"
            problems.append(Check(name="model", status="warn", detail=text))
    return sources, problems


def _device(params: Params, machine: Machine, *, is_here: bool) -> tuple[Device, tuple[str, ...]]:
    """Return the device, its pace measured where it `is_here`, and what is assumed of its time."""
    precision = params.train.optim.precision
    if not machine.gpus:
        speed = pace.cpu_pace()
        text = f"this processor: {speed.utilisation:.0%} of {speed.flops_per_second / 1e9:.0f} GFLOP/s, measured now"
        return Device(element_bytes=2 if precision == "bf16" else 4, pace=speed), (text, *needs.ASSUMED_OF_TIME)
    gpu = machine.gpus[0]
    element_bytes = 2 if gpu.bf16 and precision != "fp32" else 4
    measured = pace.gpu_pace(element_bytes) if is_here else None
    device = Device(element_bytes=element_bytes, pace=measured)
    if measured is None:
        return device, (f"{gpu.name}, one device",)
    tflops = measured.flops_per_second / 1e12
    text = f"{gpu.name}, one device: {measured.utilisation:.0%} of {tflops:.0f} TFLOP/s, measured now"
    return device, (text, *needs.ASSUMED_OF_TIME)


def _targets(params: Params, sources: Mapping[str, SourceModel]) -> Iterator[Check]:
    """Find targets of LoRA that a model lacks: training refuses them, after the release has been fetched."""
    targets = {target for task in params.tasks for target in params.train.for_task(task).lora.target_modules}
    for model in {source.name: source for source in sources.values()}.values():
        if model.size is not None and (unmatched := model.size.unmatched_targets(sorted(targets))):
            text = f"{model.name} has no module {', '.join(unmatched)} that LoRA adapts; correct lora.target_modules"
            yield Check(name="lora", status="fail", detail=text)


def _data(params: Params, folder: Path) -> Iterator[Check]:
    """Check that tasks and corpora are on this machine, or have a name that the hub can provide."""
    here = folder / params.prepare.data
    remote = []
    for kind, name, is_known in _named(params):
        try:
            if sources.here(here, name):
                continue
        except DataError as error:
            yield Check(name="data", status="fail", detail=str(error))
            continue
        if is_known():
            remote.append(name)
        else:
            text = f"{name}: neither in {params.prepare.data} nor {kind}; put its files there, or correct its name"
            yield Check(name="data", status="fail", detail=text)
    recipes = params.evolve.releases.values()
    released = (params.fetch.source, *(recipe.source for recipe in recipes if recipe.source))
    if remote or any("/" in name and not Path(name).is_dir() for name in released):
        yield _hub(params, remote)


def _named(params: Params) -> Iterator[tuple[str, str, Callable[[], bool]]]:
    """Yield what each task and corpus outside the embedded world must be, its name, and whether it is that."""
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


def _hub(params: Params, remote: Sequence[str]) -> Check:
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token (`hf auth login`, for gated models)"
    text = f"{', '.join(remote)} come from it, unless put under {params.prepare.data}; {token}" if remote else token
    if constants.HF_HUB_OFFLINE:
        offline = f"switched off (HF_HUB_OFFLINE), so its cache must have all; {text}"
        return Check(name="hub", status="warn", detail=offline)
    return Check(name="hub", status="ok", detail=text)


def _kept(copies: int) -> str:
    if copies == 1:
        return "DVC's cache links what it keeps (cache.type), so that each byte is on the disk once"
    return "DVC's cache keeps a second copy; `dvc config cache.type reflink,hardlink,copy` avoids it"


def _room(diagnosis: Diagnosis, folder: Path) -> Iterator[Check]:
    if not diagnosis.stages:
        return
    needed = max(0, diagnosis.disk_bytes - _stored_bytes(folder / "models")) + ROOM_BYTES
    free = diagnosis.machine.disk_free_bytes
    text = f"{size(needed)} needed, {size(free)} free"
    if needed > free:
        text += "; free some, or put the project on another disk"
    yield Check(name="disk", status="ok" if needed <= free else "fail", detail=text)


def _power(diagnosis: Diagnosis, device: Device) -> Iterator[Check]:
    """Check memory and time of the stages."""
    if diagnosis.stages:
        yield _memory(diagnosis)
        yield _patience(diagnosis, device)


def _memory(diagnosis: Diagnosis) -> Check:
    machine, needed = diagnosis.machine, diagnosis.memory_bytes + OWN_BYTES
    total = machine.gpus[0].memory_bytes if machine.gpus else machine.ram_bytes
    free = machine.gpus[0].free_bytes if machine.gpus else machine.ram_available_bytes
    stage = max(diagnosis.stages, key=lambda s: s.memory_bytes).stage
    kind = "GPU memory" if machine.gpus else "memory"
    text = f"{size(needed)} of {kind} needed at most (by {stage}), {size(total)} in all, {size(free)} free now"
    status: Status = "ok"
    if any(model.size is not None and model.size.widths is None for model in diagnosis.models.values()):
        text += "; activations are not counted"
        status = "warn"
    if needed > total:
        text += (
            "; try train.quantization: 4bit, gradient_checkpointing, a smaller batch_size with gradient_accumulation, "
            "or several devices by accelerate launch with configs/accelerate"
        )
        return Check(name="memory", status="fail", detail=text)
    return Check(name="memory", status="warn" if needed > free else status, detail=text)


def _patience(diagnosis: Diagnosis, device: Device) -> Check:
    if device.pace is None:
        text = (
            f"no pace was measured for {diagnosis.device}, so no hours are given; on that machine, `portllm doctor` "
            "with these params measures it, and `python benchmarks/efficiency.py` a training"
        )
        return Check(name="time", status="warn", detail=text)
    if diagnosis.hours is None:
        return Check(name="time", status="warn", detail="not estimated for this architecture (see: not counted)")
    text = f"about {duration(3600 * diagnosis.hours)} on {diagnosis.device}"
    if diagnosis.hours > PATIENCE_HOURS:
        advice = "use a GPU" if not diagnosis.machine.gpus else "use more or faster GPUs, or fewer tasks and releases"
        limit = duration(3600 * PATIENCE_HOURS)
        return Check(name="time", status="fail", detail=f"{text}, more than {limit}; {advice}")
    return Check(name="time", status="ok", detail=text)


def _devices(machine: Machine) -> Iterator[Check]:
    if machine.gpus and machine.torch_cuda is None:
        yield Check(
            name="device", status="fail",
            detail=f"{machine.gpus[0].name} is available, but torch {machine.packages['torch']} has no CUDA; "
            "install the CUDA build of the same version",
        )  # fmt: skip
        return
    for gpu in machine.gpus:
        short = "" if gpu.bf16 else ", no bf16: it computes in float32"
        yield Check(
            name="device", status="ok" if gpu.bf16 else "warn", detail=f"{gpu.name}, {size(gpu.memory_bytes)}{short}"
        )
    if len(machine.gpus) > 1:
        text = f"the pipeline uses one device, or all by {ENVIRONMENT}=FILE (see configs/accelerate)"
        yield Check(name="device", status="ok", detail=text)
    if not machine.gpus:
        yield Check(name="device", status="ok", detail=f"no CUDA device; {machine.cores} cores of {machine.cpu}")


def _software(params: Params, machine: Machine) -> Iterator[Check]:
    if params.train.quantization == "4bit" and machine.packages["bitsandbytes"] is None:
        yield Check(name="bitsandbytes", status="fail", detail="train.quantization is 4bit; pip install bitsandbytes")
    attentions = {params.train.optim.attention, params.evolve.optim.attention}
    if "flash_attention_2" in attentions and machine.packages["flash-attn"] is None:
        yield Check(
            name="flash-attn", status="fail", detail="optim.attention requires it; install flash-attn, or use sdpa"
        )


def _sharing(params: Params, machine: Machine) -> Iterator[Check]:
    """Check that the processes share a step's rows evenly: training refuses others, after everything is fetched."""
    if not (config := os.environ.get(ENVIRONMENT)):
        return
    try:
        count = equipment.processes(Path(config), lambda: len(machine.gpus))
    except MachineError as error:
        yield Check(name="launch", status="fail", detail=str(error))
        return
    uneven = {name: rows for name, rows in _batches(params) if rows % count}
    if not uneven:
        yield Check(name="launch", status="ok", detail=f"{count} processes ({ENVIRONMENT})")
    for name, rows in uneven.items():
        fitting = ", ".join(str(n) for n in range(1, count) if rows % n == 0)
        yield Check(
            name="launch", status="fail",
            detail=f"{name} is {rows}, which the {count} processes of {ENVIRONMENT} cannot share evenly; "
            f"show them fewer GPUs (CUDA_VISIBLE_DEVICES; {fitting} would do), or set num_processes",
        )  # fmt: skip


def _batches(params: Params) -> Iterator[tuple[str, int]]:
    """Yield the rows of one step, all processes together, of everything that is trained."""
    if params.fetch.source in (models.WORLD, models.SCRATCH):
        yield "fetch.optim.batch_size", params.fetch.optim.batch_size
    if any(params.evolve.releases[release].source is None for release in params.releases[1:]):
        yield "evolve.optim.batch_size", params.evolve.optim.batch_size
    for task in params.tasks:
        own = "batch_size" in params.train.per_task[task].optim if task in params.train.per_task else False
        name = f"train.per_task.{task}.optim.batch_size" if own else "train.optim.batch_size"
        yield name, params.train.for_task(task).optim.batch_size


def _stored_bytes(folder: Path) -> int:
    paths = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in paths)
