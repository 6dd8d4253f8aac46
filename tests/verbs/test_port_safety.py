"""A port is whole, recorded, and safe: or it ends in one clear line with nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.record.records import PatchRecord, PortRecord, Source
from portllm.errors import OutputError, PatchError, PortllmError, ShapeError, UnmatchedModulesError
from portllm.params import PortParams
from portllm.verbs import port


def files(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its digest; a link counts as what it points to."""
    return {
        p.relative_to(folder).as_posix(): blake3(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*")) if p.is_file()
    }  # fmt: skip


def merged(patch: Path, onto: Path, out: Path, **more: Any) -> PortRecord:
    return port.run(patch=patch, onto=onto, out=out, params=PortParams(), **more)


class Bench:
    """A base of a few tensors, and a patch for it: for everything that needs no real model."""

    def __init__(self, folder: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]) -> None:
        self.folder = folder
        torch.manual_seed(0)
        names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(3) for kind in "qkv"]
        tensors = {f"{name}.weight": torch.randn(6, 4) for name in names}
        tensors |= {
            "model.embed_tokens.weight": torch.randn(11, 4),
            "lm_head.weight": torch.randn(11, 4),
            "big": torch.ones(9, 9),
        }
        order = sorted(tensors)
        self.base = make_checkpoint(folder / "in" / "base", tensors, shards=[order[:4], order[4:9], order[9:]])
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
            (self.base / name).write_text(f"base's {name}")
        (self.base / "README.md").write_text("base's card")
        (self.base / "consolidated.safetensors").write_bytes(b"stray")
        pairs = {name: (torch.randn(2, 4), torch.randn(6, 2)) for name in names if "k_proj" not in name}
        self.patch = make_patch(folder / "in" / "patch", pairs, base_model_name_or_path="/somebodys/disk/old-base")
        self.out = folder / "out"

    def run(self, **more: Any) -> PortRecord:
        return merged(self.patch, self.base, self.out, **more)


@pytest.fixture
def bench(tmp_path: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]) -> Iterator[Bench]:
    bench = Bench(tmp_path, make_checkpoint, make_patch)
    inputs = files(tmp_path / "in")
    yield bench
    assert files(tmp_path / "in") == inputs or "inputs are altered by the test" in os.listdir(tmp_path)


def altered(bench: Bench) -> None:
    """Say that this test itself changes its inputs."""
    (bench.folder / "inputs are altered by the test").touch()


class TestFiles:
    def test_same_names_same_shards_same_headers_same_bytes(self, bench: Bench) -> None:
        record = bench.run()
        before, after = files(bench.base), files(bench.out)
        assert set(after) == (set(before) - {"consolidated.safetensors"}) | {"port.json"}
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {
            "README.md",
            "port.json",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
        }
        assert record.files == {name: digest for name, digest in after.items() if name != "port.json"}
        for shard in bench.base.glob("model-*.safetensors"):
            length = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
            assert (bench.out / shard.name).read_bytes()[:length] == shard.read_bytes()[:length]
            old, new = load_file(shard), load_file(bench.out / shard.name)
            same = {name for name in old if torch.equal(old[name], new[name])}
            assert same == {name for name in old if "q_proj" not in name and "v_proj" not in name}

    def test_an_untouched_shard_is_byte_identical(self, bench: Bench, make_patch: Callable[..., Path]) -> None:
        patch = make_patch(
            bench.folder / "small", {"model.layers.0.self_attn.q_proj": (torch.ones(2, 4), torch.ones(6, 2))}
        )
        merged(patch, bench.base, bench.out)
        before, after = files(bench.base), files(bench.out)
        assert sum(before[n] != after[n] for n in before if n.startswith("model-")) == 1

    def test_a_zero_patch_changes_nothing(self, bench: Bench, make_patch: Callable[..., Path]) -> None:
        patch = make_patch(bench.folder / "zero", {"lm_head": (torch.ones(2, 4), torch.zeros(11, 2))})
        record = merged(patch, bench.base, bench.out)
        assert record.fingerprint == record.base.fingerprint == fingerprint(bench.base)

    def test_the_patchs_tokenizer_wins(self, bench: Bench) -> None:
        altered(bench)
        (bench.patch / "tokenizer.json").write_text("patch's")
        (bench.patch / "chat_template.jinja").write_text("patch's")
        bench.run()
        assert (bench.out / "tokenizer.json").read_text() == "patch's"
        assert (bench.out / "chat_template.jinja").read_text() == "patch's"
        assert not (bench.out / "tokenizer_config.json").exists()
        assert (bench.out / "LICENSE").read_text() == "base's LICENSE"

    def test_links_of_a_hub_cache_become_files(self, bench: Bench) -> None:
        snapshot = bench.folder / "models--org--base" / "snapshots" / "abc123"
        snapshot.mkdir(parents=True)
        for path in bench.base.iterdir():
            (snapshot / path.name).symlink_to(path)
        record = merged(bench.patch, snapshot, bench.out)
        assert not any(path.is_symlink() for path in bench.out.iterdir())
        assert (record.base.name, record.base.revision) == ("org/base", "abc123")

    def test_adapter_is_the_patch_for_another_base(self, bench: Bench) -> None:
        record = port.run(patch=bench.patch, onto=bench.base, out=bench.out, params=PortParams(as_="adapter"))
        before, after = files(bench.patch), files(bench.out)
        assert set(after) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "port.json"}
        assert after["adapter_model.safetensors"] == before["adapter_model.safetensors"]
        old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (bench.patch, bench.out))
        assert new == {**old, "base_model_name_or_path": "base", "revision": None}
        assert record.output == "adapter"
        assert record.files["adapter_config.json"] == after["adapter_config.json"]


class TestRecord:
    def test_says_what_was_done(self, bench: Bench) -> None:
        record = bench.run()
        assert PortRecord.read(bench.out) == record
        assert record.modules == {"matched": 6, "total": 10}
        assert record.tensors == {"changed": 6, "copied": 6}
        assert record.fingerprint == fingerprint(bench.out)
        assert record.base == Source(name="base", fingerprint=fingerprint(bench.base))
        assert record.patch == Source(name="patch", fingerprint=fingerprint(bench.patch))
        assert record.trained_on == Source(name="old-base", fingerprint=None)
        assert str(bench.folder) not in (bench.out / "port.json").read_text() + (bench.out / "README.md").read_text()
        assert "base_model" in (bench.out / "README.md").read_text()

    def test_relative_names_stay_as_they_were_given(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(bench.folder)
        record = merged(Path("in/patch"), Path("in/base"), Path("out"))
        assert (record.base.name, record.patch.name) == ("in/base", "in/patch")

    def test_same_inputs_same_bytes(self, bench: Bench) -> None:
        bench.run()
        first = files(bench.out)
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            bench.run(force=True)  # the fingerprint cache may be warm by now
        finally:
            torch.set_num_threads(threads)
        assert files(bench.out) == first

    def test_base_the_patch_was_trained_on(self, bench: Bench, make_checkpoint: Callable[..., Path]) -> None:
        altered(bench)
        old = make_checkpoint(bench.folder / "old", {"x": torch.ones(1)})
        trained = PatchRecord(
            task="world_boolq", base=Source(name="v0", fingerprint=fingerprint(old)), fingerprint="2" * 64
        )
        trained.write(bench.patch)
        record = bench.run()  # another base: no error, but said
        assert record.task == "world_boolq"
        assert record.trained_on == trained.base != record.base
        assert bench.run(source=old, force=True).trained_on == trained.base
        with pytest.raises(
            PatchError, match=r"the patch was trained on v0 with fingerprint .*; pass that base as --from"
        ):
            bench.run(source=bench.base, force=True)

    def test_progress_reaches_its_total(self, bench: Bench) -> None:
        for as_ in ("merged", "adapter"):
            seen: list[tuple[int, int]] = []
            port.run(
                patch=bench.patch, onto=bench.base, out=bench.folder / as_, params=PortParams(as_=as_),
                on_progress=lambda done, total, seen=seen: seen.append((done, total)),
            )  # fmt: skip
            assert seen[-1][0] == seen[-1][1]

    def test_dry_run_writes_nothing(self, bench: Bench) -> None:
        record = bench.run(dry_run=True)
        assert record.modules == {"matched": 6, "total": 10}
        assert sorted(os.listdir(bench.folder)) == ["in"]


QUERY = "model.layers.0.self_attn.q_proj"
ADAPTER = "adapter_model.safetensors"


def lora_on(bench: Bench, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Give the patch these factors for a module."""
    prefix = f"base_model.model.{module}.lora_"
    tensors = {**load_file(bench.patch / ADAPTER), f"{prefix}A.weight": a, f"{prefix}B.weight": b}
    save_file(tensors, bench.patch / ADAPTER)


@pytest.mark.parametrize(
    ("error", "module", "rows"),
    [(ShapeError, QUERY, 7), (UnmatchedModulesError, "model.x", 6)],
    ids=["shape", "module"],
)
def test_nothing_is_read_at_length_before_the_plan_stands(
    error: type[PortllmError], module: str, rows: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered(bench)
    lora_on(bench, module, torch.ones(2, 4), torch.ones(rows, 2))
    for reader in ("read", "array", "rows"):
        monkeypatch.setattr(f"portllm.checkpoint.files.tensors.TensorEntry.{reader}", lambda *_: pytest.fail("read"))
    with pytest.raises(error):
        bench.run()


class TestOutput:
    def test_an_existing_out_is_refused_at_once(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        bench.run()
        first = files(bench.out)
        with monkeypatch.context() as patched:
            patched.setattr(port.Patch, "open", lambda *_: pytest.fail("read"))
            with pytest.raises(OutputError, match="pass --force"):
                bench.run()
        assert files(bench.out) == first
        (bench.out / "stray").touch()
        bench.run(force=True)
        assert files(bench.out) == first

    def test_ctrl_c_leaves_nothing(self, bench: Bench) -> None:
        def interrupt(done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bench.run(on_progress=interrupt)
        assert sorted(os.listdir(bench.folder)) == ["in"]


FRUGAL = """
    import re, sys
    from pathlib import Path
    from portllm.params import PortParams
    from portllm.verbs import port
    assert "torch" not in sys.modules
    used = []
    for size in ("small", "large"):
        patch, base, out = (Path(sys.argv[1]) / size / name for name in ("patch", "base", "out"))
        port.run(patch=patch, onto=base, out=out, params=PortParams())
        # not ru_maxrss, which counts what the parent held when it forked
        used.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
    heavy = {"transformers", "peft", "datasets", "lm_eval", "mlflow", "pandas"} & set(sys.modules)
    assert not heavy, heavy
    assert used[1] - used[0] < 48, f"{used[1] - used[0]} MiB more for 96 MiB of weights"
"""


def test_a_port_needs_no_model_class_and_little_memory(
    tmp_path: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]
) -> None:
    for size, rows in (("small", 64), ("large", 1 << 18)):
        pairs = {"w": (torch.ones(2, 64), torch.ones(rows, 2))}
        make_patch(tmp_path / size / "patch", pairs)
        make_checkpoint(tmp_path / size / "base", {"w.weight": torch.zeros(rows, 64), "x": torch.zeros(32 * rows)})
    command = [sys.executable, "-c", textwrap.dedent(FRUGAL), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
