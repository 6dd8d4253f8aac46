"""How many processes a command will be run as, as an accelerate configuration and this machine's GPUs say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from portllm.errors import MachineError

# so that the same dvc.yaml uses all GPUs of the machine it is run on
ENVIRONMENT = "PORTLLM_ACCELERATE"


def processes(config: Path, count_gpus: Callable[[], int]) -> int:
    """Over all machines; at most as many as there are GPUs, on one. Raises MachineError."""
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
            f"{config}: needs GPUs, and this machine has none that torch sees; try configs/accelerate/cpu-2"
        )
    return wanted if machines > 1 else min(wanted, gpus)
