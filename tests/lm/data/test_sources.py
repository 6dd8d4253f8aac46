"""A dataset of the hub is of the commit it is recorded under, or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from portllm.errors import DataError
from portllm.lm.data import sources

OLD, NEW = "a" * 40, "b" * 40


def test_a_copy_of_another_commit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # what `datasets` gives, with a warning, when the hub is out of reach: its latest copy, whatever was asked for
    latest = f"/cache/datasets/owner___words/default/0.0.0/{NEW}/words-train.arrow"

    def load(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(cache_files=[{"filename": latest}])

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match="did not give commit aaaaaaaaaaaa, and the latest copy .* is of bbbbbbbbbbbb"):
        sources.hub("owner/words", None, ["train"], OLD)
