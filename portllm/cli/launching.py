"""One command on all GPUs, or on several machines: run again as many processes by `accelerate launch`."""

from __future__ import annotations

import functools
import logging
import os
import subprocess  # noqa: S404  (for the name of its error)
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from portllm.cli.options import DIRECTORY
from portllm.cli.running import follow_parent
from portllm.errors import MachineError

Command = TypeVar("Command", bound=Callable[..., Any])

# so that the same dvc.yaml uses all GPUs of the machine it is run on
ENVIRONMENT = "PORTLLM_ACCELERATE"
# what was launched does not launch again
LAUNCHED = "PORTLLM_LAUNCHED"
STOPPED = 130


def launchable(command: Command) -> Command:
    """Gives a command the option --launch, which runs it as the processes an accelerate configuration describes."""

    @functools.wraps(command)
    def launched(*, launch: Path | None, **rest: Any) -> Any:
        if launch is None or LAUNCHED in os.environ:
            return command(**rest)
        return click.get_current_context().exit(_launch(launch, sys.argv[1:]))

    text = f"Run as the processes this accelerate configuration describes (configs/accelerate) [env: {ENVIRONMENT}]."
    return cast(Command, click.option("--launch", type=DIRECTORY, envvar=ENVIRONMENT, help=text)(launched))


def _launch(config: Path, words: list[str]) -> int:
    """Exit code of `accelerate launch … portllm WORDS`. Raises MachineError."""
    if not config.is_file():
        raise MachineError(f"{config}: expected an accelerate configuration, found no file; see configs/accelerate")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the process that failed has said why; the launcher would add a page about it
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    follow_parent()
    try:
        launch_command(launch_command_parser().parse_args(["--config_file", str(config), "-m", "portllm", *words]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return STOPPED if all(code == STOPPED for code in codes) else 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    except (ValueError, TypeError, KeyError) as error:
        raise MachineError(f"{config}: accelerate refuses it ({' '.join(str(error).split())[:300]})") from error
    return 0
