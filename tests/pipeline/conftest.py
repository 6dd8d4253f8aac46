"""A copy of the project's pipeline in a directory of its own, where DVC keeps its files as well."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.pipeline import fork_server

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that use the fork server in one process, so that one server loads the libraries."""
    for item in items:
        if "forked" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("forked"))


class Project:
    """A directory with the project's dvc.yaml, params.yaml and sources, where `dvc` may be called."""

    def __init__(self, folder: Path, path: Sequence[Path]) -> None:
        self.folder = folder
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join([*map(str, path), str(BIN), os.environ["PATH"]]),
            "HF_HUB_OFFLINE": "1",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(folder / ".site-cache"),
        }

    def dvc(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `dvc …`, which must succeed; returns what it printed."""
        done = subprocess.run(
            ["dvc", *words], cwd=self.folder, env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start `dvc …` in a session of its own."""
        return subprocess.Popen(
            ["dvc", *words],
            cwd=self.folder,
            env=self.env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def edit(self, old: str, new: str) -> None:
        """Replace a text that must stand in params.yaml."""
        file = self.folder / "params.yaml"
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a `portllm` whose processes are forked from one that has loaded every library.

    For pipelines that are run for what they write: see fork_server.py for what is not as in a process of its own.
    """
    folder = tmp_path_factory.mktemp("forked")
    address = folder / "socket"
    fork_server.write_clients(folder, address)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, str(Path(fork_server.__file__)), str(address)],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not address.exists():
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "the libraries did not load"
            time.sleep(0.1)
        yield folder
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Project]:
    """project(path=[…]): a fresh copy; directories in `path` come first on its PATH."""

    def make(path: Sequence[Path] = ()) -> Project:
        folder = tmp_path / "project"
        folder.mkdir()
        for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "portllm", folder / "portllm", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / ".git").mkdir()
        (folder / "data" / "local").mkdir(parents=True)  # where a user's own data would be
        one = Project(folder, path)
        one.dvc("init", "--no-scm", "-q")
        return one

    return make


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, forked: Path) -> Project:
    """The project's files without git, as an exported archive has them, ready for `make`; `portllm` is forked."""
    folder = tmp_path_factory.mktemp("archive") / "project"
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", "Makefile", "dvc.yaml", "params.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in (".dvc/plots", "portllm", "data/local"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):  # what the Makefile's .venv depends on
        shutil.copy(ROOT / name, folder / name)
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "portllm").symlink_to(forked / "portllm")
    (commands / "dvc").symlink_to(BIN / "dvc")
    return Project(folder, [])
