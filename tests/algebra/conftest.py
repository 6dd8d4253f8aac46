"""The two ways of summing, numpy's passes and the compiled library, for tests that hold for both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from portllm.algebra import kernel


def use(way: str, patch: pytest.MonkeyPatch) -> None:
    """Have sums computed by `way`: numpy, or instructions by name; skips where this machine has none of them."""
    patch.setenv(kernel.VARIABLE, way)
    if way != "numpy" and kernel.name() != f"compiled {way}":
        pytest.skip(f"sums by {way} need the compiled library and a processor that has them: pip install -e .")


@pytest.fixture(scope="module", params=["numpy", "compiled"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """`numpy`, or the best instructions of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernel.VARIABLE, raising=False)
        level = kernel.level()
        name = "numpy" if request.param == "numpy" else kernel.LEVELS[level or 0]
        use(name, patch)
        yield name
