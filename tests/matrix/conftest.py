"""The bench of the matrix: tiny bases, made once in a session."""

from __future__ import annotations

import pytest

from portllm.lm.quiet import quieten
from tests.matrix.judge import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Old and new base of every architecture, each made when first asked for."""
    quieten()
    return Bench(tmp_path_factory.mktemp("bases"))
