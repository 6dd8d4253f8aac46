"""A process with every library loaded that forks one process for each call of `portllm`; a program of its own.

    fork_server.py SOCKET

A pipeline of a dozen stages imports the same libraries in two dozen processes, which takes a minute of CPU time. Here a
stage is a process of its own as well, with the caller's arguments, environment, working directory and open files, but
one that was forked after the imports. What depends on who a process's parent is (a stage that ends with its DVC, runs
grouped by DVC process) is not the same; test_kill.py and test_tracking.py have that.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

CLIENT = """#!{python} -SE
import json, os, socket, sys
words, module = sys.argv[1:], {module!r}
if module is None:  # in place of a Python interpreter: of `-m` alone
    if words[:1] != ["-m"]:
        os.execv({python!r}, [{python!r}, *words])
    module, words = words[1], words[2:]
for handle in (0, 1, 2):
    try:
        os.fstat(handle)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_RDWR), handle)
call = {{"module": module, "words": words, "folder": os.getcwd(), "environment": dict(os.environ)}}
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(json.dumps(call).encode() + b"\\n")
sys.exit(int(server.makefile().readline() or 1))
"""


def write_clients(folder: Path, address: Path) -> None:
    """Write `portllm` and `python` into `folder`: executables that call the server at `address`."""
    for name, module in (("portllm", "portllm"), ("python", None)):
        file = folder / name
        file.write_text(CLIENT.format(python=sys.executable, module=module, address=str(address)), encoding="utf-8")
        file.chmod(0o755)


def load() -> None:
    """Import what stages and the recorder import."""
    import mlflow  # noqa: F401
    import peft  # noqa: F401
    from lm_eval.models import huggingface  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer  # noqa: F401

    import portllm.cli
    import portllm.tracking.__main__  # noqa: F401

    gc.collect()
    gc.freeze()  # or the collector writes to every page that forks share


def serve(address: Path) -> dict[str, Any]:
    """Answer calls for ever in forks; returns in the process that is to carry out a call."""
    signal.signal(signal.SIGTERM, lambda *_: (reap(), os._exit(0)))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen()
        while True:
            caller, _ = listening.accept()
            reap()
            if os.fork() == 0:
                break
            caller.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _, handles, _, _ = socket.recv_fds(caller, 1, 3)
    call: dict[str, Any] = json.loads(caller.makefile().readline())
    if (worker := os.fork()) == 0:
        for number, handle in enumerate(handles):
            os.dup2(handle, number)
        return call
    for handle in handles:  # a reader of the stage's output must see its end
        os.close(handle)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    _, status = os.waitpid(worker, 0)
    caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def reap() -> None:
    """Collect processes that ended: else they stay zombies, and their CPU time counts nowhere."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def carry_out(call: dict[str, Any], python: str) -> None:
    """Run the module as its caller would; `python` is what it may start as an interpreter."""
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.executable = python
    words = call["words"]
    if call["module"] == "portllm.tracking":
        words = [str(os.getppid())]  # the recorder ends with its parent, which here is the one that forked it
    sys.argv = [call["module"], *words]
    code: object = 0
    try:
        runpy.run_module(call["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))  # taking all libraries down takes half a second


if __name__ == "__main__":
    place = Path(sys.argv[1])
    load()
    carry_out(serve(place), str(place.parent / "python"))
