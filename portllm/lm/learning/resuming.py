"""A training's whole state, taken from a running Trainer and given back to one: on one process or many.

What is sharded over processes (FSDP) is gathered whole, so a snapshot is one file; giving back spreads the main
process's file over all, so that only its disk has to have it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from portllm import processes
from portllm.lm.learning.snapshots import Snapshot

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

MODEL, OPTIMIZER = "model.", "optimizer."
CPU, CUDA, LOSS = "random.cpu", "random.cuda", "loss"


def capture(trainer: Any) -> Snapshot:
    """The state after the step just made: trained weights, optimizer, schedule, random generators, running loss.

    Every process has to call it; the main one's is whole, the others' are of no use.
    """
    import torch

    optimizer = _plain(trainer.optimizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(trainer.model):
        own = {MODEL + name: parameter}
        own |= {f"{OPTIMIZER}{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        gathered = {key: whole(value) for key, value in own.items()}
        tensors.update(gathered if processes.is_main() else {})
    tensors[CPU] = _gathered(trainer, torch.get_rng_state())
    if torch.cuda.is_available():
        tensors[CUDA] = _gathered(trainer, torch.cuda.get_rng_state())
    tensors[LOSS] = _gathered(trainer, trainer._tr_loss.reshape(1))
    state = {
        "trainer": dataclasses.asdict(trainer.state),
        "last_logged": trainer._globalstep_last_logged,
        "schedule": trainer.lr_scheduler.state_dict(),
        "rates": [group["lr"] for group in optimizer.param_groups],
        "moments": sorted({key for moments in optimizer.state.values() for key in moments}),
        "scalars": sorted({k for moments in optimizer.state.values() for k, v in moments.items() if v.dim() == 0}),
    }
    return Snapshot(trainer.state.global_step, tensors, state)


class Resumed:
    """A snapshot on its way into a Trainer; only the main process holds its tensors."""

    def __init__(self, snapshot: Snapshot | None) -> None:
        self._tensors: Mapping[str, Tensor] = snapshot.tensors if snapshot else {}
        told = [json.dumps({"step": snapshot.step, "state": dict(snapshot.state)}) if snapshot else ""]
        if processes.count() > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(told)
        self._told: dict[str, Any] = json.loads(told[0]) if told[0] else {}

    def __bool__(self) -> bool:
        return bool(self._told)

    @property
    def step(self) -> int:
        """The steps already made."""
        return int(self._told["step"])

    @property
    def trainer_state(self) -> dict[str, Any]:
        """What Trainer keeps in trainer_state.json: the history of the loss, and how far it had come."""
        state: dict[str, Any] = self._told["state"]["trainer"]
        return state

    def give_weights(self, model: Module) -> None:
        """Put the trained weights into `model`."""
        for name, parameter in _trained(model):
            parameter.data.copy_(_spread(self._tensors.get(MODEL + name), parameter.data))

    def give_optimizer(self, trainer: Any) -> None:
        """Put back the optimizer's moments and the schedule's place."""
        import torch

        optimizer, state = _plain(trainer.optimizer), self._told["state"]
        names = {id(parameter): name for name, parameter in _trained(trainer.model)}
        tree = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            scalar = torch.zeros((), device=trainer.args.device)
            tree["state"][index] = {
                key: _spread(
                    self._tensors.get(f"{OPTIMIZER}{key}.{names[id(parameter)]}"),
                    scalar if key in state["scalars"] else parameter.data,
                )
                for key in state["moments"]
            }
        for group, rate in zip(tree["param_groups"], state["rates"], strict=True):
            group["lr"] = rate
        optimizer.load_state_dict(tree)
        trainer.lr_scheduler.load_state_dict(state["schedule"])
        # the rest has been given: of a whole 7B model it is 84 GB
        self._tensors = {name: self._tensors[name] for name in (CPU, CUDA, LOSS) if name in self._tensors}

    def give_random(self, device: Any) -> None:
        """Put each process's random generators where they were."""
        import torch

        torch.set_rng_state(self._own(CPU, torch.get_rng_state(), device))
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(self._own(CUDA, torch.cuda.get_rng_state(), device))

    def give_loss(self, trainer: Any) -> None:
        """Put back the loss that was summed since it was last logged."""
        trainer._tr_loss.copy_(self._own(LOSS, trainer._tr_loss.reshape(1), trainer.args.device)[0])
        trainer._globalstep_last_logged = self._told["state"]["last_logged"]

    def _own(self, name: str, like: Tensor, device: Any) -> Tensor:
        """This process's row of what `_gathered` made."""
        template = like.to(device).expand(processes.count(), *like.shape)
        row = _spread(self._tensors.get(name), template)[processes.index()]
        return row.to(like.device).clone()  # set_rng_state reads a view from the start of what it is a view of


def whole(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, gathered from all processes where it is sharded over them."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    copy: Tensor = full.detach().to("cpu", copy=True).contiguous()
    return copy


def _spread(value: Tensor | None, like: Any) -> Tensor:
    """The main process's `value` on every process, on the device and in the shards of `like`."""
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


def _gathered(trainer: Any, own: Tensor) -> Tensor:
    """One row for each process, on the CPU."""
    rows = trainer.accelerator.gather(own[None].to(trainer.args.device))
    cpu: Tensor = rows.detach().cpu().clone()
    return cpu


def _trained(model: Module) -> Iterator[tuple[str, Parameter]]:
    """The trained parameters by name, the same name whether the model is wrapped or not."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.removeprefix("module."), parameter


def _plain(optimizer: Any) -> Any:
    """torch's optimizer, out of accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
