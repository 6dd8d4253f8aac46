"""The tests themselves: what a shell leaves them with does not matter, and they leave the project as it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import surroundings

ROOT = Path(__file__).parents[1]
# as a shell without job control starts a background job, and nohup on top of it; without a terminal's variables
BACKGROUND = 'trap "" INT QUIT HUP; unset SHELL TERM HOME; exec "$@" <&-'
INTERRUPTED = "import time; print('ready', flush=True); time.sleep(60)"


def test_an_interrupt_ends_a_process_that_a_test_started() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    try:
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in error
    assert process.returncode == -signal.SIGINT


def test_from_a_background_job_without_a_terminal_tests_pass() -> None:
    """Run the test above as `nohup make test &` would; it did not pass (issue 8, item 18)."""
    name = f"{Path(__file__)}::{test_an_interrupt_ends_a_process_that_a_test_started.__name__}"
    done = _pytest(ROOT, "-q", name, shell=BACKGROUND)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project with the conftest and the plugins of this one and no tests yet."""
    for name in ("conftest.py", "surroundings.py"):
        (tmp_path / "project" / "tests").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, tmp_path / "project" / "tests" / name)
    (tmp_path / "project" / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts="--import-mode=importlib"')
    for name in ("mlflow.db", "README.md"):
        (tmp_path / "project" / name).write_text("runs")
    return tmp_path / "project"


def test_a_test_that_writes_into_the_project_fails_the_run(small: Path) -> None:
    """Fail although every test passed: `make test` left runs in the project's mlflow.db (issue 8, item 18)."""
    body = "(ROOT / 'mlflow.db').write_text('four more'); (ROOT / 'models').mkdir(); (ROOT / 'README.md').unlink()"
    done = _run(small, f"def test_it():\n    {body}\n")
    assert done.returncode == 1, done.stdout
    assert "1 passed" in done.stdout
    for line in ("changed: mlflow.db", "added: models", "removed: README.md"):
        assert line in done.stdout


def test_what_a_test_writes_by_default_lands_outside_the_project(small: Path, tmp_path: Path) -> None:
    """Keep mlflow.db, home and caches of the user out of reach (issue 8, item 18)."""
    home = tmp_path / "home"
    home.mkdir()
    body = """
    Path("mlflow.db").write_text("four failed runs")
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "DVC_SITE_CACHE_DIR", "XDG_CONFIG_HOME"):
        (Path(os.environ[name]) / "written").write_text("by a test")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    """
    theirs = {
        "HOME": str(home),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MPLCONFIGDIR": str(home),
        "HF_TOKEN": "x",
    }
    done = _run(small, f"def test_it():{body}", **theirs)
    assert done.returncode == 0, done.stdout
    assert (small / "mlflow.db").read_text() == "runs"
    assert list(home.iterdir()) == []


def test_a_process_left_by_a_test_is_ended_and_no_other_test_fails_by_it(small: Path) -> None:
    """Fail the test that leaves it, and no test after it: five followed the one that hung (issue 8, item 18)."""
    done = _run(
        small,
        f"def test_leaving():\n    subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(300)'])\n"
        "def test_after():\n    assert psutil.Process().children() == []\n",
    )
    assert "2 passed, 1 error" in done.stdout, done.stdout
    assert "the test left processes running" in done.stdout
    assert "time.sleep(300)" in done.stdout


def test_tests_of_one_module_run_in_one_process(small: Path) -> None:
    """Detect versions of pytest and pytest-xdist that ignore groups without a word (issue 8, item 19)."""
    done = _run(small, "def test_it():\n    pass\n", more=("-vv", "-n", "1", "--dist", "loadgroup"))
    assert "test_it.py::test_it@tests/test_it.py" in done.stdout, done.stdout


def test_differences_name_each_path_once() -> None:
    before = {"a": (1, 1), "b": (1, 1), "c": ()}
    assert surroundings.differences(before, {"a": (1, 1), "b": (1, 2), "d": ()}) == [
        "added: d",
        "removed: c",
        "changed: b",
    ]


def _run(project: Path, tests: str, more: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run a file of tests in a project."""
    head = f"import os, psutil, subprocess\nfrom pathlib import Path\nROOT = Path({str(project)!r})\n"
    (project / "tests" / "test_it.py").write_text(head + tests)
    return _pytest(project, "-q", "-p", "no:cacheprovider", *more, **env)


def _pytest(folder: Path, *words: str, shell: str = 'exec "$@"', **env: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder, by way of a shell script that gets its command line as arguments."""
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "pytest", *words]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=300
    )
