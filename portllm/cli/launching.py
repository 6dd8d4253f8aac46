"""One command on all GPUs, or on several machines: started again as several processes by `accelerate launch`."""

from __future__ import annotations

import functools
import logging
import os
import subprocess  # noqa: S404  (for the name of its error)
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from portllm import processes
from portllm.cli.options import DIRECTORY
from portllm.cli.running import follow_parent
from portllm.errors import MachineError
from portllm.lm.sizing import equipment
from portllm.lm.sizing.equipment import ENVIRONMENT

Command = TypeVar("Command", bound=Callable[..., Any])

# set for the processes that were launched, which do not launch again
LAUNCHED = "PORTLLM_LAUNCHED"
STOPPED = 130


def launchable(command: Command) -> Command:
    """Give a command the option --launch, which runs it as the processes of an accelerate configuration."""
    return launchable_where(lambda _: True)(command)


def launchable_where(shared: Callable[[Mapping[str, Any]], bool]) -> Callable[[Command], Command]:
    """Like `launchable`, but with one process where the flags leave no work to share, as `shared` returns.

    Each of several processes would copy a complete release, which all but the main one would delete.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def launched(*, launch: Path | None, **rest: Any) -> Any:
            if launch is None or _is_launched() or not shared(rest) or (count := _processes(launch)) == 1:
                return command(**rest)
            return click.get_current_context().exit(_launch(launch, count, sys.argv[1:]))

        text = f"Run as the processes this accelerate configuration describes (configs/accelerate) [env: {ENVIRONMENT}]"
        return cast(Command, click.option("--launch", type=DIRECTORY, envvar=ENVIRONMENT, help=f"{text}.")(launched))

    return decorate


def _is_launched() -> bool:
    """Return whether this is one of several processes, started by portllm or by `accelerate launch` itself."""
    return LAUNCHED in os.environ or processes.count() > 1


def _processes(config: Path) -> int:
    """Return how many processes to start (see `equipment.processes`). Raises MachineError."""

    def gpus() -> int:
        import torch

        return torch.cuda.device_count()

    return equipment.processes(config, gpus)


def _launch(config: Path, count: int, words: list[str]) -> int:
    """Run `accelerate launch … portllm WORDS` and return its exit code. Raises MachineError."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the process that failed has printed its error; the launcher would add a page about it
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    follow_parent()
    call = ["--config_file", str(config), "--num_processes", str(count), "-m", "portllm", *words]
    try:
        launch_command(launch_command_parser().parse_args(call))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return STOPPED if all(code == STOPPED for code in codes) else 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    except (ValueError, TypeError, KeyError) as error:
        raise MachineError(f"{config}: accelerate refuses it ({' '.join(str(error).split())[:300]})") from error
    return 0
