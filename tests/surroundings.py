"""What a test run is kept from, and what it may rely on: folders of its own, signals, threads and an unchanged project.

Neither the user's home, caches and settings nor the project's stores are read or written, whatever the environment of
the shell that started the run: no terminal, no SHELL, no TERM, a closed stdin, or signals ignored as a background job
has them.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

# variables that would lead a test to the user's stores, accounts and settings, or to another answer
FOREIGN = (
    "ACCELERATE_", "DVC_", "FSDP_", "GIT_", "HF_", "HUGGING_FACE_", "MLFLOW_", "PORTLLM_", "PYTORCH_", "TORCH_",
    "TRANSFORMERS_", "XDG_",
)  # fmt: skip
# variable → folder below the run's own one
FOLDERS = {
    "HOME": "home",
    "XDG_CACHE_HOME": "home/.cache",
    "XDG_CONFIG_HOME": "home/.config",
    "XDG_DATA_HOME": "home/.local/share",
    "XDG_STATE_HOME": "home/.local/state",
    "HF_HOME": "home/.cache/huggingface",
    "TORCH_HOME": "home/.cache/torch",
    "DVC_SITE_CACHE_DIR": "dvc/site",
    "DVC_GLOBAL_CONFIG_DIR": "dvc/global",
    "DVC_SYSTEM_CONFIG_DIR": "dvc/system",
}
# font tables of matplotlib, which take a second to make: one folder for all workers of a run
SHARED = {"MPLCONFIGDIR": "matplotlib"}
SETTINGS = {
    "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_NOSYSTEM": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # workers share the cores among themselves
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT)
# caches of the tools that a run of the tests may write
TOOLS = {".git", ".venv", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache"}
IGNORED = TOOLS | {"__pycache__"}
NAMED_AT_MOST = 20

State = dict[str, tuple[int, ...]]


class Surroundings:
    """A pytest plugin: one environment for the whole run, undone at its end."""

    def __init__(self, *, worker: str | None) -> None:
        """Replace the environment; `worker` is the name of one of several processes, None for the one that reports."""
        self._before = dict(os.environ)
        self.folder = Path(tempfile.mkdtemp(prefix="portllm-tests-"))
        shared = {} if worker else SHARED
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            del os.environ[name]
        for name, folder in {**FOLDERS, **shared}.items():
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
            os.environ[name] = str(self.folder / folder)
        os.environ.update(SETTINGS, GIT_CONFIG_GLOBAL=str(self.folder / "home" / ".gitconfig"))

    def pytest_unconfigure(self) -> None:
        """Restore the environment and remove the run's folder."""
        os.environ.clear()
        os.environ.update(self._before)
        shutil.rmtree(self.folder, ignore_errors=True)


class UnchangedProject:
    """A pytest plugin: the run fails when it changed, added or removed a file of the project."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._before = state(root)
        self._changes: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Compare the project with what it was."""
        self._changes = differences(self._before, state(self._root))
        if self._changes and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the files that differ."""
        if not self._changes:
            return
        terminalreporter.section("the project is not as it was before the tests", red=True)
        for line in self._changes[:NAMED_AT_MOST]:
            terminalreporter.line(line)
        if len(self._changes) > NAMED_AT_MOST:
            terminalreporter.line(f"… {len(self._changes)} in all")
        terminalreporter.line("A test wrote there, or somebody else did meanwhile: then run the tests again.")


def state(root: Path) -> State:
    """Return size and time of change of every file below `root`, by its path; folders are without either."""
    found: State = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in IGNORED]
        for name in folders:
            found[os.path.relpath(os.path.join(folder, name), root)] = ()
        for name in files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if not stat.S_ISSOCK(status.st_mode):
                found[os.path.relpath(path, root)] = (status.st_size, status.st_mtime_ns)
    return found


def differences(before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a line for each path that was added, removed or changed."""
    return [
        *(f"added: {path}" for path in sorted(after.keys() - before.keys())),
        *(f"removed: {path}" for path in sorted(before.keys() - after.keys())),
        *(f"changed: {path}" for path in sorted(before.keys() & after.keys()) if before[path] != after[path]),
    ]


def restore_signals() -> dict[signal.Signals, signal.Handlers]:
    """Set ignored signals to their default handlers, here and so in child processes; returns what was set before.

    A shell without job control starts a background job with SIGINT and SIGQUIT ignored, nohup ignores SIGHUP, and every
    child process inherits it.
    """
    changed = {}
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            changed[number] = signal.signal(number, default)
    return changed


def children() -> set[int]:
    """Return the ids of the processes that this one started and that are still there."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            text = Path(f"/proc/self/task/{task}/children").read_text(encoding="ascii")
        except OSError:  # the thread ended, or the kernel does not list children
            continue
        found |= {int(word) for word in text.split()}
    return found


def end(pids: set[int]) -> list[str]:
    """Kill these processes and all below them; returns their command lines, zombies and Python's own helpers apart."""
    lines = []
    for pid in sorted(pids):
        try:
            process = psutil.Process(pid)
            line = " ".join(process.cmdline())
            if not line or "multiprocessing.resource_tracker" in line:
                continue
            below = [*process.children(recursive=True), process]
        except psutil.Error:
            continue
        lines.append(line[:200])
        for one in below:
            try:
                one.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(below, timeout=5)
    return lines
