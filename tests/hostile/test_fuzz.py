"""Thousands of mutated inputs: each is ported right or refused in one line; nothing hangs, nothing else is touched."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from portllm.errors import PortllmError
from portllm.params import PortParams
from portllm.verbs import port, verify

CASES = 360
REAL_PORTS = 8  # one case in so many is ported for real, the others dry
HANG_CPU_SECONDS, HANG_SECONDS = 2.0, 60.0

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own affairs

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 8, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, math.inf, math.nan,
    "", ".", "..", "../x", "/", "x", "\0", "\n", "\x1b[31m", "\ud800", "\u202e", "é", "a" * 5000, "[", "(a+)+$", "none",
    "F32", "BF16", "I64", "F4", "model.norm.weight", "lm_head", "q_proj", "model.safetensors", "all-linear", "all",
    [], {}, [[]], [None], [0], [-1], [0, 0], [2**62, 2**62], ["q_proj"], {"": {}}, {"a": None}, {"q_proj": 2},
)  # fmt: skip


class Mutator:
    """Seeded changes of bytes, of JSON, and of a safetensors file's header."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def bytes(self, raw: bytes, reach: int) -> bytes:
        """Some bytes among the first `reach` flipped, cut out, put in twice; or the end cut off or drawn out."""
        data = bytearray(raw)
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(min(reach, len(data) or 1))
            kind = self.random.randrange(6)
            if kind < 3:
                data[at : at + 1] = bytes([self.random.randrange(256)])
            elif kind == 3:
                del data[at : at + self.random.randint(1, 9)]
            elif kind == 4:
                data[at:at] = data[at : at + self.random.randint(1, 9)]
            else:
                data[self.random.randrange(len(data) + 1) :] = bytes(self.random.randrange(3))
        return bytes(data)

    def json(self, raw: bytes) -> bytes:
        """One to three places of a JSON tree changed."""
        tree = json.loads(raw)
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            tree = self._tree(tree)
        return json.dumps(tree).encode()

    def header(self, raw: bytes) -> bytes:
        """The same data under another header."""
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        text = self.json(raw[8:start])
        return struct.pack("<Q", len(text)) + text + raw[start:]

    def _tree(self, tree: Any, depth: int = 0) -> Any:
        if isinstance(tree, dict) and tree and (depth == 0 or self.random.random() < 0.6):
            return self._object(dict(tree), depth)
        if isinstance(tree, list) and tree and self.random.random() < 0.6:
            at = self.random.randrange(len(tree))
            return [*tree[:at], self._tree(tree[at], depth + 1), *tree[at + 1 :]]
        return self._value(tree)

    def _object(self, tree: dict[Any, Any], depth: int) -> Any:
        key, other = self.random.choice(list(tree)), self.random.choice(list(tree))
        kind = self.random.randrange(10)
        if kind < 6:
            tree[key] = self._tree(tree[key], depth + 1)
        elif kind == 6:
            del tree[key]
        elif kind == 7:
            tree[key], tree[other] = tree[other], tree[key]
        elif kind == 8:
            name = self.random.choice([value for value in NASTY if isinstance(value, str)])
            tree[self.random.choice((name, key + name))] = tree.pop(key)
        else:
            tree[str(self.random.choice(NASTY))] = tree[key]
        return tree

    def _value(self, value: Any) -> Any:
        kind = self.random.randrange(8)
        if kind == 0 and isinstance(value, int | float):
            return value * self.random.choice((-1, 2, 0.5, 1e30)) + self.random.choice((0, 1, -1))
        if kind == 1:
            return [value] * self.random.choice((1, 2, 100))
        if kind == 2:
            deep: Any = value
            for _ in range(self.random.choice((2, 50, 200))):
                deep = {"base": deep}
            return deep
        return self.random.choice(NASTY)


Mutation = Callable[[Mutator, Any], tuple[Path, bytes]]


def of_bytes(file: str) -> Mutation:
    def mutate(mutator: Mutator, bench: Any) -> tuple[Path, bytes]:
        path = getattr(bench, file)
        raw = path.read_bytes()
        return path, mutator.bytes(raw, 8 + struct.unpack("<Q", raw[:8])[0] if path.suffix == ".safetensors" else 4096)

    return mutate


def of_json(file: str) -> Mutation:
    return lambda mutator, bench: (getattr(bench, file), mutator.json(getattr(bench, file).read_bytes()))


def of_header(file: str) -> Mutation:
    return lambda mutator, bench: (getattr(bench, file), mutator.header(getattr(bench, file).read_bytes()))


def of_other_family(mutator: Mutator, bench: Any) -> tuple[Path, bytes]:
    """The config of a family whose layout only transformers has; it gets whatever the file contains."""
    other = {**json.loads(bench.config.read_bytes()), "model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"]}
    tree = json.loads(mutator.json(json.dumps(other).encode()))
    return bench.config, json.dumps(tree).encode()


MUTATIONS: dict[str, Mutation] = {
    "bytes of a shard's header": of_bytes("shard"),
    "bytes of the adapter's header": of_bytes("adapter"),
    "bytes of the index": of_bytes("index"),
    "bytes of the adapter's config": of_bytes("lora"),
    "tree of a shard's header": of_header("shard"),
    "tree of the adapter's header": of_header("adapter"),
    "tree of the index": of_json("index"),
    "tree of the config": of_json("config"),
    "tree of another family's config": of_other_family,
    "tree of the adapter's config": of_json("lora"),
    "tree of patch.json": of_json("record"),
}


# most changes of these are none to the port
FORGIVING = {
    "tree of the config",
    "tree of another family's config",
    "tree of the adapter's config",
    "tree of patch.json",
}


class Guard:
    """An audit hook that fails when a file outside the allowed folders is opened for writing, renamed or removed."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        sys.addaudithook(self._check)

    def _check(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.allowed or not _writes(event, args):
            return
        for place in _places(event, args):
            if not place.startswith((*self.allowed, "/dev/null")) and not place.endswith((".pyc", "__pycache__")):
                raise AssertionError(f"{event} outside: {place}")


def _places(event: str, args: tuple[Any, ...]) -> Iterator[str]:
    """The absolute paths of an event; what shutil.rmtree names is below a directory it holds open."""
    handle = args[-1] if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") else -1
    folder = os.readlink(f"/proc/self/fd/{handle}") if handle >= 0 else os.getcwd()
    for place in args[: 2 if event == "os.rename" else 1]:
        if isinstance(place, str | bytes | os.PathLike):
            yield os.path.normpath(os.path.join(folder, os.fsdecode(place)))


def _writes(event: str, args: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    return event in (
        "os.rename",
        "os.mkdir",
        "os.remove",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
    )


GUARD = Guard()


@pytest.fixture
def guard(bench: Any, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written but in this test's folder and cache; patterns that do not end are given up soon."""
    monkeypatch.setattr("portllm.checkpoint.adapter.patterns.SECONDS", 0.3)
    warm_up(bench)
    monkeypatch.setattr(GUARD, "allowed", (str(bench.folder), str(private_cache)))
    yield
    GUARD.allowed = ()


@pytest.mark.usefixtures("guard")
@pytest.mark.parametrize("target", MUTATIONS)
def test_right_or_refused(target: str, bench: Any) -> None:
    bench.record = bench.patch / "patch.json"
    base = {"name": "v0", "fingerprint": "0" * 64, "revision": None, "quantisation": None}
    record = {"schema_version": 1, "task": "t", "base": base, "fingerprint": "1" * 64, "data": {"a/b": "c"}}
    bench.record.write_text(json.dumps({**record, "params": {"r": 2}, "metrics": {"loss": 0.5}, "versions": {}}))
    mutator, outcomes = Mutator(target), Counter[str]()
    for case in range(CASES):
        path, mutated = MUTATIONS[target](mutator, bench)
        pristine = path.read_bytes()
        path.write_bytes(mutated)
        params = PortParams(as_="adapter" if case % 5 == 0 else "merged")
        outcomes[one_port(bench, f"{target}, case {case}", params, real=case % REAL_PORTS == 0)] += 1
        path.write_bytes(pristine)
    assert outcomes["refused"] > CASES / 20, outcomes
    if target in FORGIVING:  # else only refusals were tried
        assert outcomes["checked"] > 5, outcomes
        assert outcomes["ported"] > 0, outcomes


def warm_up(bench: Any) -> None:
    """Import what a port imports, transformers too, so that no case pays for it."""
    pristine = bench.config.read_bytes()
    for family in ("llama", "mixtral"):
        bench.edit(bench.config, model_type=family)
        with contextlib.suppress(PortllmError):
            port.run(patch=bench.patch, onto=bench.base, out=bench.out, params=PortParams(), dry_run=True)
    bench.config.write_bytes(pristine)


def one_port(bench: Any, case: str, params: PortParams, *, real: bool) -> str:
    """Port the bench as it is now: "ported" for real, "checked" dry, or "refused"; or an assertion fails."""
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)  # again for each case; see never_hangs
    before, started, outcome, line = inputs(bench), time.process_time(), "refused", "none"
    try:
        port.run(patch=bench.patch, onto=bench.base, out=bench.out, params=params, dry_run=not real)
        outcome = "ported" if real else "checked"
    except PortllmError as error:
        line = str(error)
    except Exception as error:
        raise AssertionError(f"{case} ends in {error!r}") from error
    assert line.isprintable(), case
    assert 0 < len(line) < 1000, case
    assert time.process_time() - started < HANG_CPU_SECONDS, case
    assert inputs(bench) == before, case
    assert sorted(os.listdir(bench.folder)) == (["in", "out"] if outcome == "ported" else ["in"]), case
    if outcome != "refused":
        for folder in (bench.base, bench.patch, bench.out):
            loads(folder, case)
        shutil.rmtree(bench.out, ignore_errors=True)
    return outcome


def inputs(bench: Any) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of every input file."""
    status = {str(path): path.lstat() for path in (bench.folder / "in").rglob("*")}
    return {name: (one.st_ino, one.st_size, one.st_mtime_ns) for name, one in status.items()}


def loads(folder: Path, case: str) -> None:
    """safetensors' own reader, independent of ours, takes every file of what was accepted or written."""
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    assert file.get_slice(name).get_shape() is not None
        except Exception as error:
            raise AssertionError(f"{case}: accepted, but safetensors says of {path.name}: {error}") from error


@pytest.mark.usefixtures("guard")
@pytest.mark.parametrize("as_", ["merged", "adapter"])
def test_verify_finds_every_change_and_survives_every_record(as_: Any, bench: Any) -> None:
    port.run(patch=bench.patch, onto=bench.base, out=bench.out, params=PortParams(as_=as_))
    mutator, outcomes, written = Mutator(f"verify {as_}"), Counter[str](), sorted(bench.out.iterdir())
    for case in range(CASES // 3):
        path = mutator.random.choice(written) if case % 2 else bench.out / "port.json"
        pristine = path.read_bytes()
        path.write_bytes(mutator.bytes(pristine, len(pristine)) if case % 2 else mutator.json(pristine))
        changed = path.name != "port.json" and path.read_bytes() != pristine
        outcome = one_verification(bench, f"verify {as_}, case {case}", proof=case % 8 == 0)
        assert outcome == "refused" or not changed, f"case {case}: {path.name} is another, and nobody saw"
        outcomes[outcome] += 1
        path.write_bytes(pristine)
    assert one_verification(bench, "the pristine directory", proof=True) == "proven"
    assert outcomes["refused"] > CASES / 6, outcomes


def one_verification(bench: Any, case: str, *, proof: bool) -> str:
    """Verify the written directory as it is now: "proven" or "refused", or an assertion fails."""
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    made_from = {"onto": bench.base, "patch": bench.patch} if proof else {}
    try:
        verify.run(folder=bench.out, **made_from)
    except PortllmError as error:
        line = str(error)
    except Exception as error:
        raise AssertionError(f"{case} ends in {error!r}") from error
    else:
        return "proven"
    assert line.isprintable(), case
    assert 0 < len(line) < 1000, case
    return "refused"
