"""A small true Llama, a patch for it, and a look at a folder that sees every byte, link and time in it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from portllm.checkpoint.files import hashing as fingerprint
from portllm.cli import main
from portllm.errors import PortllmError

HIDDEN, INNER, VOCABULARY, LAYERS, RANK = 8, 12, 11, 2, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": HIDDEN // 2,
    "vocab_size": VOCABULARY, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 4, "bias": "none",
    "target_modules": ["q_proj", "v_proj", "down_proj"], "base_model_name_or_path": "somebody/old-base",
}  # fmt: skip
HANG_SECONDS = 60

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Llama's tensors."""
    named: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        named |= {f"{layer}.self_attn.{k}_proj.weight": (HIDDEN, HIDDEN) for k in "qkvo"}
        named |= {f"{layer}.mlp.{k}_proj.weight": (INNER, HIDDEN) for k in ("gate", "up")}
        named |= {f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER)}
        named |= {f"{layer}.{k}_layernorm.weight": (HIDDEN,) for k in ("input", "post_attention")}
    return named


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file by the book, written without the code under test."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def read_tensors(path: Path) -> Tensors:
    """What `write_tensors` wrote."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    tree = json.loads(raw[8:start])
    tree.pop("__metadata__", None)
    return {
        name: (e["dtype"], tuple(e["shape"]), raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in tree.items()
    }


def look(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder: kind, size, time of change, and content or target of each path."""
    seen: dict[str, tuple[Any, ...]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        content: Any = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode) and status.st_size < 1 << 24:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        changed = status.st_mtime_ns if path != folder else None  # OUT is written next to itself, in the folder
        seen[path.relative_to(folder).as_posix()] = (status.st_mode, status.st_size, changed, content)
    return seen


class Bench:
    """A base in three shards, the base before it, a patch, and OUT; the methods break them in some way."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.random = np.random.default_rng(seed)
        self.base, self.old, self.patch = (folder / "in" / name for name in ("base", "old", "patch"))
        self.out: Path = folder / "out"
        self.args: list[str] = []
        self._checkpoint(self.base)
        self._checkpoint(self.old)
        self._patch()
        self.config, self.index = self.base / "config.json", self.base / "model.safetensors.index.json"
        self.shard = self.base / "model-00002-of-00003.safetensors"
        self.adapter, self.lora = self.patch / "adapter_model.safetensors", self.patch / "adapter_config.json"

    def values(self, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
        """A random float32 tensor."""
        return "F32", shape, self.random.standard_normal(shape).astype("<f4").tobytes()

    def _checkpoint(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        tensors = {name: self.values(*shape) for name, shape in sorted(shapes().items())}
        names = list(tensors)
        parts = [names[:5], names[5:14], names[14:]]
        where: dict[str, str] = {}
        for i, part in enumerate(parts):
            file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
            write_tensors(folder / file, {name: tensors[name] for name in part})
            where |= dict.fromkeys(part, file)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "generation_config.json").write_text("{}")

    def _patch(self) -> None:
        self.patch.mkdir(parents=True)
        tensors: Tensors = {}
        for name, (rows, columns) in ((n, s) for n, s in sorted(shapes().items()) if len(s) == 2):
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in ADAPTER["target_modules"]:
                tensors[f"base_model.model.{module}.lora_A.weight"] = self.values(RANK, columns)
                tensors[f"base_model.model.{module}.lora_B.weight"] = self.values(rows, RANK)
        write_tensors(self.patch / "adapter_model.safetensors", tensors)
        (self.patch / "adapter_config.json").write_text(json.dumps(ADAPTER))

    @property
    def argv(self) -> list[str]:
        """The command line of the port."""
        return ["port", str(self.patch), "--onto", str(self.base), "--out", str(self.out), *self.args]

    def edit(self, path: Path, **keys: Any) -> None:
        """Set keys of a JSON object."""
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    def without(self, path: Path, *keys: str) -> None:
        """Drop keys of a JSON object."""
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))

    def text(self, path: Path, text: str | bytes) -> None:
        """Other content."""
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def remap(self, **changes: Any) -> None:
        """Other entries of the index; None takes one out."""
        tree = json.loads(self.index.read_text())
        tree["weight_map"] = {k: v for k, v in {**tree["weight_map"], **changes}.items() if v is not None}
        self.index.write_text(json.dumps(tree))

    def put(self, path: Path, name: str, tensor: tuple[str, tuple[int, ...], bytes] | None) -> None:
        """Another tensor of that name, or none."""
        tensors: dict[str, Any] = {**read_tensors(path), name: tensor}
        write_tensors(path, {k: v for k, v in tensors.items() if v is not None})

    def rename(self, path: Path, old: str, new: str) -> None:
        """Every tensor name with `old` replaced by `new`."""
        write_tensors(path, {k.replace(old, new): v for k, v in read_tensors(path).items()})

    def filled(self, path: Path, part: str, value: float) -> None:
        """The tensors whose name holds `part`, with their first value replaced."""
        tensors = read_tensors(path)
        for name, (dtype, shape, data) in tensors.items():
            if part in name:
                tensors[name] = dtype, shape, struct.pack("<f", value) + data[4:]
        write_tensors(path, tensors)

    def header(self, path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        """A header that describes the same data otherwise: `change` edits its tree, or returns the new text."""
        raw = path.read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        tree = json.loads(raw[8:start])
        replacement = change(tree)
        text = replacement if isinstance(replacement, bytes) else json.dumps(tree).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[start:])

    def length(self, path: Path, length: int) -> None:
        """A header that claims another length of itself."""
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    def instead(self, path: Path, make: Callable[[Path], Any]) -> None:
        """Something else in place of a file: a directory, a FIFO, a link."""
        path.unlink()
        make(path)

    def single(self) -> None:
        """The base in one file, without an index."""
        tensors: Tensors = {}
        for shard in sorted(self.base.glob("model-*.safetensors")):
            tensors |= read_tensors(shard)
            shard.unlink()
        self.index.unlink()
        write_tensors(self.base / "model.safetensors", tensors)

    def pickles(self, folder: Path, name: str) -> None:
        """Pickles in place of the safetensors."""
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / name).write_bytes(b"\x80\x04.")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A healthy base and patch, to be spoilt."""
    return Bench(tmp_path)


@pytest.fixture
def looked() -> Callable[[Path], Mapping[str, tuple[Any, ...]]]:
    """The function `look`."""
    return look


@pytest.fixture
def tensors_of() -> Callable[[Path], Tensors]:
    """The function `read_tensors`, the independent reader."""
    return read_tensors


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """Whatever is read, it ends: even where a call blocks in the kernel."""

    def stop(*_: object) -> None:
        pytest.fail(f"hangs for {HANG_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def ported() -> Callable[[Bench], Mapping[str, Any]]:
    """Port a bench through the command line, in process: the JSON object it answers with."""

    def run(bench: Bench) -> Mapping[str, Any]:
        done = CliRunner().invoke(main, [*bench.argv, "--json"])
        assert done.exit_code == 0, done.stderr
        return dict(json.loads(done.stdout))

    return run


@pytest.fixture
def refused(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a bench's command line: it must end in one line, with everything as it was before; returns the line."""
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -(1 << 62))  # every digest is kept at once

    def run(bench: Bench, code: int = 1, *, honest: bool = True) -> str:
        before = look(bench.folder)
        done = CliRunner().invoke(main, bench.argv)
        assert isinstance(done.exception, SystemExit), repr(done.exception)
        assert done.exit_code == code, done.output
        assert look(bench.folder) == before
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        lines = done.stderr.removesuffix("\n").split("\n") if code == 1 else done.stderr.splitlines()[-1:]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("Error: ")
        assert lines[0].isprintable()
        assert len(lines[0]) < 1000
        if honest:
            _honest(private_cache, bench, monkeypatch)
        return lines[0]

    return run


def _honest(cache: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the failed run left in the cache of digests is the truth."""
    warm = [_fingerprint(Path(folder)) for folder in (bench.base, bench.old, bench.patch)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "cold"))
    assert [_fingerprint(Path(folder)) for folder in (bench.base, bench.old, bench.patch)] == warm
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def _fingerprint(folder: Path) -> str:
    try:
        return fingerprint.fingerprint(folder)
    except (PortllmError, OSError) as error:
        return str(error)
