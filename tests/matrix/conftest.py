"""The bench of the matrix: tiny bases, made once in a session; tests of one architecture run in one process."""

from __future__ import annotations

import pytest

from portllm.lm.quiet import quieten
from tests.matrix.judge import Bench, Case


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests of an architecture, which share its bases; a test of several is a group of its own."""
    for item in items:
        if not item.nodeid.startswith("tests/matrix/"):
            continue
        values = getattr(item, "callspec", None)
        item.add_marker(pytest.mark.xdist_group(_architecture(dict(values.params) if values else {}) or item.name))


def _architecture(values: dict[str, object]) -> str | None:
    """Return the architecture among the parameters of a test."""
    case, name = values.get("case"), values.get("architecture", values.get("name"))
    if isinstance(case, Case):
        return case.architecture
    if isinstance(name, str):
        from tests.matrix.cases import CASES

        return next((case.architecture for case in CASES if name in (str(case), case.architecture)), None)
    return None


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Old and new base of every architecture, each made when first needed."""
    quieten()
    return Bench(tmp_path_factory.mktemp("bases"))
