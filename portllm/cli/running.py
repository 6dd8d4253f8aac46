"""The parts that all commands share: settings, progress, tracking, cost, the JSON object."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from portllm import params, processes
from portllm.errors import PortllmError

if TYPE_CHECKING:
    from portllm.tracking import Tracker

# DVC sets it for the commands of its stages; a command called by hand has it not
DVC_ROOT = "DVC_ROOT"
ORPHAN_POLL_SECONDS = 0.5
# DVC runs a stage in $SHELL, else in sh; some shells stay as the stage's parent
SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish", "busybox"})
PLAIN_SECONDS = 5.0
# an error of one process is mostly one of the main process, too, which prints it and has the launcher end the others
OTHERS_WAIT_SECONDS = 10.0
# time for the clean-up after a signal; the launcher kills after 30 seconds
LEAVING_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every pipeline command."""

    params_file: Path | None
    cost: Path | None
    as_json: bool


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options before the command's name."""

    verbose: int = 0
    quiet: bool = False
    track: bool | None = None

    def tracking(self, params_file: Path | None) -> bool:
        """Return whether MLflow records this call: by --track, else in a pipeline or with MLFLOW_TRACKING_URI."""
        if self.track is not None:
            return self.track
        return params_file is not None or DVC_ROOT in os.environ or "MLFLOW_TRACKING_URI" in os.environ


class Verbs(click.Group):
    """The commands in the order of the pipeline; errors become one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PortllmError as error:
            if ctx.params.get("verbose", 0) > 1:
                raise
            _finish_leaving()
            click.echo(f"Error{_of_which_process()}: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            _finish_leaving()
            if processes.is_main():
                click.echo("Stopped.", err=True)
            ctx.exit(130)


def _of_which_process() -> str:
    """Return "" in the main process; another process first waits, so that the main one reports the error."""
    if processes.is_main():
        return ""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # this process has nothing to clean up
    time.sleep(OTHERS_WAIT_SECONDS)
    return f" in process {processes.index()} of {processes.count()}"


def join_the_others() -> None:
    """Clean up when the launcher ends this process because another one of the same job failed."""
    if processes.count() == 1:
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_leave, args=(reading,), daemon=True, name="leave").start()


def _finish_leaving() -> None:
    """Remove partial output when one of several processes ends; ignore the launcher's signal from here on."""
    from portllm.checkpoint.files.output import abandon

    if processes.count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        abandon()


def _leave(signals: int) -> None:
    """End this process some time after a signal: Python handles none while C++ code waits for another process."""
    from portllm.checkpoint.files.output import abandon

    os.read(signals, 1)
    time.sleep(LEAVING_SECONDS)
    abandon()
    os._exit(1)


class Stage:
    """One call of a command: shows progress, and passes metrics and results to the tracker."""

    def __init__(self, verb: str, settings: Settings, tracker: Tracker) -> None:
        self._verb = verb
        self._settings = settings
        self.tracker = tracker
        self._bar: Any = None
        self._started_at = self._shown_at = time.monotonic()
        self.cost: dict[str, Any] = {}
        self.figures: dict[str, float] = {}
        self.bytes_done = 0

    def progress(self, done: int, total: int, note: str = "", *, unit: str = "it") -> None:
        """Show `done` of `total`: a bar with rate and remaining time on a terminal, a line now and then otherwise."""
        if self._settings.quiet or total <= 0:
            return
        if done == 0:  # the time before, such as loading, is not part of the rate
            self._started_at = time.monotonic()
        if sys.stderr.isatty():
            self._advance(done, total, note, unit)
        elif time.monotonic() - self._shown_at >= PLAIN_SECONDS:
            self.part(done, total, f"{note} {self._pace(done, total, unit)}", unit=unit)

    def part(self, done: int, total: int, note: str = "", *, unit: str = "") -> None:
        """Print in a plain line that `done` of `total` is done, for work that shows its own bars."""
        self._shown_at = time.monotonic()
        if not self._settings.quiet:
            counted = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB" if unit == "B" else f"{done}/{total} {unit}"
            click.echo(" ".join(f"{self._verb}: {counted} {note}".split()), err=True)

    def bytes(self, done: int, total: int) -> None:
        """Show progress, counted in bytes."""
        self.bytes_done = done
        self.progress(done, total, unit="B")

    def _pace(self, done: int, total: int, unit: str) -> str:
        """Return rate and remaining time, as the bar shows them."""
        rate = done / max(time.monotonic() - self._started_at, 1e-9)
        if rate <= 0:
            return ""
        speed = f"{rate / 1e6:.0f} MB/s" if unit == "B" else f"{rate:.1f} {unit}/s"
        return f"({speed}, {(total - done) / rate:.0f} s left)"

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send metrics of one step to the tracker."""
        self.tracker.metrics(step, values)

    def note(self, text: str) -> None:
        """Print a note on stderr, unless --quiet."""
        if not self._settings.quiet:
            click.echo(f"{self._verb}: {text}", err=True)

    def took(self, figures: Mapping[str, float]) -> None:
        """Record what training took: for --cost, for the tracker, and as a line on stderr."""
        from portllm.lm.learning import machine

        self.cost.update(figures)
        self.figures = dict(figures)
        self.close()
        self.note(machine.usage(self.figures))

    def finish(self, **result: Any) -> None:
        """Send the result, with the artifacts read and written, to the tracker (see tracking.Tracker.finish)."""
        self.close()
        result["metrics"] = {**(result.get("metrics") or {}), **self.figures, **measured()}
        self.tracker.finish(**result)

    def find(self, name: str) -> Path:
        """Return the directory of a checkpoint or patch; a download is announced and shows its progress."""
        from portllm.lm.remote.releases import DownloadCallbacks, find

        found = find(name, DownloadCallbacks(on_note=self.note, on_bytes=self.bytes))
        self.close()
        return found

    def close(self) -> None:
        """Remove the progress bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _advance(self, done: int, total: int, note: str, unit: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=self._verb, unit=unit, unit_scale=unit == "B", leave=False)
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)


@contextlib.contextmanager
def stage(verb: str, *, name: str, section: Any, opts: Common, always: bool = False) -> Iterator[Stage]:
    """Run a command's body: tracked by its settings or `always`, timed into --cost, ended with its DVC."""
    from portllm.tracking import track

    settings = click.get_current_context().find_object(Settings) or Settings()
    follow_parent()
    root = Path(os.environ.get(DVC_ROOT, "."))
    flat = params.as_tree(section) if section is not None else {}
    enabled = always or settings.tracking(opts.params_file)
    with (
        contextlib.redirect_stdout(sys.stderr),  # what libraries print: stdout is for the verb's answer alone
        track(verb, name=name, params=flat, enabled=enabled, root=root) as tracker,
    ):
        running = Stage(verb, settings, tracker)
        yield running
        if opts.cost is not None:
            _write_cost(opts.cost, {"stage": verb, **running.cost})


def hush(*, quiet: bool) -> None:
    """Configure the libraries, before their import: no bars in a log file, and no output if `quiet`."""
    if quiet or not sys.stderr.isatty():  # our own bars become plain lines there
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def place(out: Path) -> str:
    """Return a run's name after its output: `v1/boolq`, short enough for MLflow's table of runs."""
    return f"{out.parent.name}/{out.name.removeprefix('world_')}"


def answer(record: Mapping[str, Any], *, as_json: bool, line: str) -> None:
    """Print the command's one answer on stdout: a JSON object, or a line for people."""
    if not processes.is_main():
        return
    text = json.dumps(record, ensure_ascii=False) if as_json else line
    click.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))  # a file name may not be UTF-8


def measured() -> dict[str, float]:
    """Return wall seconds and peak memory in bytes of this process so far, its imports included."""
    import resource

    import psutil

    peak_rss_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"wall_seconds": time.time() - psutil.Process().create_time(), "peak_rss_bytes": peak_rss_kib * 1024}


def _write_cost(path: Path, cost: Mapping[str, Any]) -> None:
    """Write what this call cost: an observation, in no record and no output of DVC."""
    from portllm.checkpoint.files.output import staged_file
    from portllm.checkpoint.record.records import dumps

    with staged_file(path) as file:
        file.write_text(dumps({**cost, **measured()}), encoding="utf-8")


def follow_parent() -> None:
    """End this process when the DVC or launcher that started it has ended: no stage outlives a killed pipeline."""
    if DVC_ROOT not in os.environ and processes.count() == 1:
        return
    import psutil

    links = _links_to_dvc()

    def watch() -> None:
        with contextlib.suppress(psutil.Error):
            while all(process.ppid() == parent for process, parent in links):
                time.sleep(ORPHAN_POLL_SECONDS)
        # no clean-up: OUT does not exist yet, and the next run removes what is next to it
        os._exit(130)

    threading.Thread(target=watch, daemon=True, name="follow-parent").start()


def _links_to_dvc() -> list[tuple[Any, int]]:
    """Return each process from this one up to DVC with its parent: a shell between the two may outlive DVC."""
    import psutil

    links = [(psutil.Process(), os.getppid())]
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        while parent.name() in SHELLS:
            links.append((parent, parent.ppid()))
            parent = psutil.Process(parent.ppid())
    return links
