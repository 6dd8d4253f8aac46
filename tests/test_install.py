"""A wheel of the repository, installed in a fresh environment: the command, the API and every file they read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "portllm"
SOURCES = ("pyproject.toml", "setup.py", "README.md")
# files of the package that are no Python modules: a wheel has them only where pyproject.toml says so
BESIDE_CODE = (".yaml", ".j2", ".css", ".c", ".h", ".typed")


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command that does not see the repository; return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves its own directories next to what it builds."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, folder / "source" / "portllm", ignore=ignore)
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir")
    run(*pip, folder / "source", "--wheel-dir", folder, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    """issue 8, item 17."""
    found = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.suffix in (".py", *BESIDE_CODE)
    }
    assert expected <= found
    assert {Path(name).suffix for name in expected} == {".py", *BESIDE_CODE}


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """issue 8, item 17: README's `pip install .`, into an environment that has the dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    packages = Path(
        run(programs / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    )
    run(*pip, wheel, cwd=tmp_path)
    code = "import portllm; portllm.port; print(portllm.__file__, portllm.__version__)"
    file, version = run(programs / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(packages)
    assert run(programs / "portllm", "--version", cwd=tmp_path).split()[-1] == version
    assert "Commands:" in run(programs / "portllm", "--help", cwd=tmp_path)
    assert "world_boolq" in run(programs / "portllm", "tasks", cwd=tmp_path)
    made = run(programs / "portllm", "prepare", "world_sst2", "--out", "d", "--train-rows", "8", "--json", cwd=tmp_path)
    assert json.loads(made)["rows"]["train"] == 8
    machine = json.loads(run(programs / "portllm", "doctor", "--json", cwd=tmp_path))
    assert machine["ok"] is True
