"""Snapshots of a training: all that changes as it goes, captured, written, verified, and restored.

A snapshot is one safetensors file. Its name contains its step and the BLAKE3 of its bytes; it is written under another
name, synced and renamed. A file whose bytes do not hash to its name (a damaged disk, an incomplete copy) is passed over
for the one before. Tensors that are sharded over processes (FSDP) are gathered, and the main process writes the file;
restoring reads it on the main process alone and sends each process its share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.checkpoint.files.hashing import file_digest, fingerprint, tensor_hash
from portllm.checkpoint.files.names import companions
from portllm.checkpoint.files.output import sync_directory
from portllm.checkpoint.record.provenance import versions
from portllm.checkpoint.record.records import dumps

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

KEPT = 2  # the last and the one before, in case the last is damaged
READ_BYTES = 1 << 22
FORMAT = 2  # of the file's content: a snapshot of another format belongs to another training
STATE = "state"
MODEL, OPTIMIZER = "model.", "optimizer."
CPU, CUDA, LOSS = "random.cpu", "random.cuda", "loss"
_NAME = re.compile(r"(?P<step>\d{9})-(?P<digest>[0-9a-f]{64})\.safetensors")


def training_key(base: Path | None, *inputs: Any) -> str:
    """Return the SHA-256 that identifies a training: by base, inputs, libraries, processes and snapshot format.

    A snapshot is resumed where all of them are the same.
    """
    environment = [versions("torch", "transformers", "peft", "accelerate"), processes.count(), FORMAT]
    files = {name: file_digest(path) for name, path in companions(base, base).items()} if base else {}
    sources = [fingerprint(base) if base else None, files, *inputs]
    return hashlib.sha256(dumps([sources, environment]).encode()).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """A training after `step`: tensors by name, and everything else as JSON can hold it."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshots:
    """The snapshots in a folder; `note` gets a line for each that is passed over, or could not be written."""

    folder: Path
    note: Callable[[str], object] = lambda _: None

    def write(self, snapshot: Snapshot) -> None:
        """Write `snapshot`, and keep the one before it. A disk that refuses is noted; training goes on."""
        from safetensors import SafetensorError

        partial = self.folder / "partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(snapshot, partial)
            for path in self._files()[KEPT:]:
                path.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self.note(f"the checkpoint after step {snapshot.step} could not be written ({error}); training goes on")

    def _write(self, snapshot: Snapshot, partial: Path) -> None:
        from safetensors.torch import save_file

        save_file(dict(snapshot.tensors), partial, metadata={STATE: json.dumps(dict(snapshot.state))})
        digest = _digest(partial)
        handle = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        partial.rename(self.folder / f"{snapshot.step:09}-{digest}.safetensors")
        sync_directory(self.folder)

    def newest(self) -> Snapshot | None:
        """Return the last snapshot that is complete; None where there is none."""
        from safetensors import safe_open

        for path in self._files():
            name = _NAME.fullmatch(path.name)
            if name is None or _digest(path) != name["digest"]:
                self.note(f"the checkpoint after step {int(path.name[:9])} is damaged and is not used")
                continue
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()[STATE])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            return Snapshot(int(name["step"]), tensors, state)
        return None

    def _files(self) -> list[Path]:
        """Return the snapshots' paths, newest first."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in paths if _NAME.fullmatch(path.name)), reverse=True)


@dataclass
class TrainingState:
    """All that changes as a training goes, on one process: what a snapshot captures and restores.

    `model` is not wrapped (FSDP shards it in place). `loss_sum`, fp32 on `device`, is the loss of the steps after
    `logged`, the last step with a row in `history`.
    """

    model: Module
    optimizer: Any
    schedule: Any
    device: Any
    loss_sum: Tensor = field(init=False)
    step: int = 0
    logged: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        self.loss_sum = torch.zeros((), device=self.device)


def capture(state: TrainingState) -> Snapshot:
    """Return the snapshot of `state`: weights, optimizer, schedule, random generators, history, running loss.

    Every process has to call it; the main one's is complete, the others' are of no use.
    """
    import torch

    optimizer = state.optimizer
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained(state.model):
        own = {MODEL + name: parameter}
        own |= {f"{OPTIMIZER}{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        gathered = {key: gather(value) for key, value in own.items()}
        tensors.update(gathered if processes.is_main() else {})
    tensors[CPU] = _rows(torch.get_rng_state().to(state.device))
    if torch.cuda.is_available():
        tensors[CUDA] = _rows(torch.cuda.get_rng_state().to(state.device))
    tensors[LOSS] = _rows(state.loss_sum)
    moments = [values.items() for values in optimizer.state.values()]
    return Snapshot(state.step, tensors, {
        "logged": state.logged,
        "history": state.history,
        "schedule": state.schedule.state_dict(),
        "rates": [group["lr"] for group in optimizer.param_groups],
        "moments": sorted({key for items in moments for key, _ in items}),
        "scalars": sorted({key for items in moments for key, value in items if value.dim() == 0}),
    })  # fmt: skip


def restore(state: TrainingState, snapshots: Snapshots) -> Callable[[], None] | None:
    """Bring `state` to the newest of `snapshots`; None where there is none. Every process has to call it.

    Return a function that restores the random generators, to be called when the next step is about to draw from them.
    """
    snapshot = snapshots.newest() if processes.is_main() else None
    shared = [json.dumps({"step": snapshot.step, **snapshot.state}) if snapshot else ""]
    if processes.count() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(shared)
    if not shared[0]:
        return None
    values, tensors = json.loads(shared[0]), snapshot.tensors if snapshot else {}
    for name, parameter in trained(state.model):
        parameter.data.copy_(_spread(tensors.get(MODEL + name), parameter.data))
    _restore_optimizer(state, tensors, values)
    state.schedule.load_state_dict(values["schedule"])
    state.loss_sum.copy_(_own_row(tensors.get(LOSS), state.loss_sum))
    state.step, state.logged, state.history = values["step"], values["logged"], values["history"]
    return _random_restorer(tensors, state.device)


def gather(tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` on the CPU, gathered from all processes where it is sharded over them."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    copy: Tensor = full.detach().to("cpu", copy=True).contiguous()
    return copy


def trained(model: Module) -> Iterator[tuple[str, Parameter]]:
    """Yield the trained parameters of `model` by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _restore_optimizer(state: TrainingState, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Restore the optimizer's moments and learning rates."""
    import torch

    names = {id(parameter): name for name, parameter in trained(state.model)}
    tree = state.optimizer.state_dict()
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    scalar = torch.zeros((), device=state.device)
    for index, parameter in enumerate(parameters):
        tree["state"][index] = {
            key: _spread(
                tensors.get(f"{OPTIMIZER}{key}.{names[id(parameter)]}"),
                scalar if key in values["scalars"] else parameter.data,
            )
            for key in values["moments"]
        }
    for group, rate in zip(tree["param_groups"], values["rates"], strict=True):
        group["lr"] = rate
    state.optimizer.load_state_dict(tree)


def _random_restorer(tensors: Mapping[str, Tensor], device: Any) -> Callable[[], None]:
    import torch

    cpu = _own_row(tensors.get(CPU), torch.get_rng_state().to(device)).cpu()
    if not torch.cuda.is_available():
        return lambda: torch.set_rng_state(cpu)
    cuda = _own_row(tensors.get(CUDA), torch.cuda.get_rng_state().to(device)).cpu()

    def restore_both() -> None:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state(cuda)

    return restore_both


def _rows(own: Tensor) -> Tensor:
    """Return `own` of every process, one row each, on the CPU."""
    from accelerate.utils import gather as gather_rows

    rows: Tensor = gather_rows(own[None]).detach().cpu().clone()
    return rows


def _own_row(rows: Tensor | None, like: Tensor) -> Tensor:
    """Return this process's row of what `_rows` returned on the main process."""
    row = _spread(rows, like.expand(processes.count(), *like.shape))[processes.index()]
    return row.to(like.device).clone()  # set_rng_state reads a view from the start of its storage


def _spread(value: Tensor | None, like: Any) -> Tensor:
    """Return the main process's `value` on every process, on the device and in the shards of `like`."""
    import torch

    local = like.to_local() if hasattr(like, "to_local") else like
    if processes.count() == 1:
        return value.to(local.device) if value is not None else like
    full = torch.empty(like.shape, dtype=like.dtype, device=local.device)
    if value is not None:
        full.copy_(value)
    torch.distributed.broadcast(full, 0)
    if not hasattr(like, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements)


def _digest(path: Path) -> str:
    total = tensor_hash()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            total.update(block)
    return str(total.hexdigest())
