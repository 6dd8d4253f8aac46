"""Killed at any moment, run twice at once: OUT is absent or whole, and the next run makes the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("killed_port.py")
MORE = {"to a new OUT": [], "over an OUT": ["force"], "as an adapter": ["adapter"]}
MOMENTS = {"to a new OUT": 30, "over an OUT": 16, "as an adapter": 10}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE)
def test_killed_and_run_again(kind: str, bench: Any, private_cache: Path) -> None:
    signal.setitimer(signal.ITIMER_REAL, 180)  # sixty ports; see never_hangs
    for i, shard in enumerate(sorted(bench.base.glob("model-*.safetensors"))):
        # tensors the patch does not touch, so that there is something of size to be copied
        bench.put(shard, f"extra.{i}", ("F32", (1 << 18,), bytes(1 << 20)))
        bench.remap(**{f"extra.{i}": shard.name})
    out = bench.folder / "there" / "out"
    command = [sys.executable, str(SCRIPT), str(bench.patch), str(bench.base), str(out), str(MOMENTS[kind])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(private_cache / "child")}
    done = subprocess.run([*command, *MORE[kind]], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["killed"] >= MOMENTS[kind] - 2, seen  # the last step of one run may be missing in another
    assert seen["absent"] + seen["whole"] + seen["old"] == MOMENTS[kind]
    assert seen["left"] >= MOMENTS[kind] // 3, seen  # or the kills were all too early or too late
    assert seen["whole"] > 0, seen  # some came after the rename
