"""Every way a base is not what it says: one line that names the file or tensor, and nothing touched."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Spoil = Callable[[Any], object]

QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
SHARD = "model-00002-of-00003.safetensors"
FIRST = "model-00001-of-00003.safetensors"


def entry(**fields: Any) -> Spoil:
    """The shard's header tells something else of one of its tensors."""
    return lambda b: b.header(b.shard, lambda tree: tree[NORM].update(fields))


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def twice_in_the_header(b: Any) -> None:
    one = f'"{NORM}":{{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}'
    b.header(b.shard, lambda _: f"{{{one},{one}}}".encode())


def twice_in_the_index(b: Any) -> None:
    b.text(b.index, f'{{"weight_map": {{"{QUERY}": "{SHARD}", "{QUERY}": "{FIRST}"}}}}')


def two_shards_with_one_tensor(b: Any) -> None:
    b.put(b.base / FIRST, QUERY, b.values(8, 8))
    b.remap(**{QUERY: FIRST})


def moved(b: Any) -> None:
    """A tensor ends elsewhere than the one after it begins."""
    b.header(b.shard, lambda tree: tree[NORM].update(data_offsets=[o + 4 for o in tree[NORM]["data_offsets"]]))


def quantised(**config: Any) -> Spoil:
    return lambda b: b.edit(b.config, quantization_config=config)


def stored_as(dtype: str, width: int) -> Spoil:
    return lambda b: b.put(b.shard, QUERY, (dtype, (8, 8), bytes(64 * width)))


def from_elsewhere(b: Any) -> None:
    (b.folder / "secret.safetensors").write_bytes((b.base / FIRST).read_bytes())
    b.remap(**{QUERY: "../../secret.safetensors"})


CONFIG: dict[str, tuple[Spoil, str]] = {
    "config absent": (lambda b: b.config.unlink(), "config.json"),
    "config empty": (lambda b: b.text(b.config, ""), "config.json"),
    "config not JSON": (lambda b: b.text(b.config, "{'model_type': llama}"), "config.json"),
    "config cut short": (lambda b: b.text(b.config, b.config.read_bytes()[:-9]), "config.json"),
    "config an array": (lambda b: b.text(b.config, "[]"), "config.json"),
    "config null": (lambda b: b.text(b.config, "null"), "config.json"),
    "config not UTF-8": (lambda b: b.text(b.config, b'{"model_type": "\xff\xfe"}'), "config.json"),
    "config with half a character": (lambda b: b.text(b.config, '{"model_type": "\\ud800"}'), "config.json"),
    "config nested deep": (lambda b: b.text(b.config, '{"a":' + "[" * 200_000), "config.json"),
    "config with an endless number": (lambda b: b.text(b.config, '{"a": ' + "1" * 5000 + "}"), "config.json"),
    "config of gigabytes": (lambda b: os.truncate(b.config, 5 << 30), "config.json"),
    "config a directory": (lambda b: b.instead(b.config, Path.mkdir), "config.json"),
    "config a FIFO": (lambda b: b.instead(b.config, os.mkfifo), "config.json"),
    "config a socket": (lambda b: b.instead(b.config, unix_socket), "config.json"),
    "config an endless device": (lambda b: b.instead(b.config, lambda p: p.symlink_to("/dev/zero")), "config.json"),
    "config a link to itself": (lambda b: b.instead(b.config, lambda p: p.symlink_to(p.name)), "config.json"),
    "config a link to nothing": (lambda b: b.instead(b.config, lambda p: p.symlink_to("gone")), "config.json"),
    "quantised by bitsandbytes": (quantised(quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes"),
    "quantised by gptq": (quantised(quant_method="gptq", bits=4), "gptq"),
    "quantised to fp8": (quantised(quant_method="fp8"), "fp8"),
    "quantised, by what is not said": (lambda b: b.edit(b.config, quantization_config=[1]), "quantization_config"),
    "weights in fp8 without saying so": (stored_as("F8_E4M3", 1), QUERY),
    "weights as integers": (stored_as("I32", 4), QUERY),
    "weights as bytes": (stored_as("U8", 1), QUERY),
    "weights in float64": (stored_as("F64", 8), QUERY),
}

OTHERS = {
    "model_type": "seed_oss",
    "architectures": ["SeedOssForCausalLM"],
}  # a family that transformers is asked about


def asked(**config: Any) -> Spoil:
    """A config that only transformers can read, and what it makes of this."""
    return lambda b: b.edit(b.config, **OTHERS, **config)


BUILT: dict[str, tuple[Spoil, str]] = {
    "a family unheard of": (lambda b: b.edit(b.config, model_type="sunshine"), "sunshine"),
    "a family that is no text": (lambda b: b.edit(b.config, model_type=["llama"]), "model_type"),
    "layers without end": (asked(num_hidden_layers=2**31), "num_hidden_layers"),
    "more layers than tensors": (asked(num_hidden_layers=20_000), "num_hidden_layers"),
    "a size beyond memory": (asked(hidden_size=2**62), "config.json"),
    "no heads": (asked(num_key_value_heads=0), "config.json"),
    "a vocabulary of another size": (asked(vocab_size=2**40), "1099511627776"),
    "rotary embeddings of no kind": (asked(rope_parameters={"rope_type": "moonshine"}), "config.json"),
}

INDEX: dict[str, tuple[Spoil, str]] = {
    "index and single file": (lambda b: shutil.copy(b.shard, b.base / "model.safetensors"), "index.json"),
    "neither index nor single file": (lambda b: b.index.unlink(), "model.safetensors.index.json"),
    "index empty": (lambda b: b.text(b.index, ""), "index.json"),
    "index an array": (lambda b: b.text(b.index, "[]"), "index.json"),
    "index without a map": (lambda b: b.text(b.index, "{}"), "weight_map"),
    "index with an empty map": (lambda b: b.edit(b.index, weight_map={}), "weight_map"),
    "index maps to a number": (lambda b: b.remap(**{QUERY: 3}), "weight_map"),
    "index map a list": (lambda b: b.edit(b.index, weight_map=[QUERY]), "weight_map"),
    "index leads up": (from_elsewhere, "../../secret.safetensors"),
    "index leads to the root": (lambda b: b.remap(**{QUERY: "/etc/passwd.safetensors"}), "/etc/passwd"),
    "index leads down": (lambda b: b.remap(**{QUERY: f"deep/{SHARD}"}), "deep/"),
    "index names itself": (lambda b: b.remap(**{QUERY: "model.safetensors.index.json"}), "index.json"),
    "index names the directory": (lambda b: b.remap(**{QUERY: "."}), "index.json"),
    "index names a pickle": (lambda b: b.remap(**{QUERY: "pytorch_model.bin"}), "pytorch_model.bin"),
    "index names no shard": (lambda b: b.remap(**{QUERY: "model-00009-of-00003.safetensors"}), "00009"),
    "index names a shard of escapes": (
        lambda b: b.remap(**{QUERY: "a\n\x1b[2J.safetensors"}),
        "safetensors",
    ),
    "index names a shard too long": (lambda b: b.remap(**{QUERY: "a" * 3000 + ".safetensors"}), "safetensors"),
    "index names a shard with a NUL": (lambda b: b.remap(**{QUERY: "a\0.safetensors"}), "safetensors"),
    "index puts a tensor into another shard": (lambda b: b.remap(**{QUERY: FIRST}), QUERY),
    "index knows a tensor more": (lambda b: b.remap(**{"model.ghost.weight": SHARD}), "model.ghost.weight"),
    "index knows a tensor less": (lambda b: b.remap(**{QUERY: None}), QUERY),
    "index names a tensor twice": (twice_in_the_index, QUERY),
    "index a FIFO": (lambda b: b.instead(b.index, os.mkfifo), "model.safetensors"),
    "index a directory": (lambda b: b.instead(b.index, Path.mkdir), "model.safetensors"),
    "a tensor in two shards": (two_shards_with_one_tensor, QUERY),
    "a link in circles": (lambda b: b.instead(b.shard, lambda p: p.symlink_to(p.name)), SHARD),
    "a link to nothing": (lambda b: b.instead(b.shard, lambda p: p.symlink_to("gone")), SHARD),
    "pickles only": (lambda b: b.pickles(b.base, "pytorch_model.bin"), "pytorch_model.bin"),
    "weights of TensorFlow only": (lambda b: b.pickles(b.base, "tf_model.h5"), str(Path("in", "base"))),
}

SHARDS: dict[str, tuple[Spoil, str]] = {
    "shard missing": (lambda b: b.shard.unlink(), SHARD),
    "shard empty": (lambda b: b.text(b.shard, b""), SHARD),
    "shard of seven bytes": (lambda b: b.text(b.shard, b"1234567"), SHARD),
    "shard an HTML page": (lambda b: b.text(b.shard, "<!DOCTYPE html><title>404</title>"), SHARD),
    "shard a pointer of git-lfs": (lambda b: b.text(b.shard, "version https://git-lfs.github.com/spec/v1\n"), SHARD),
    "shard cut in its header": (lambda b: os.truncate(b.shard, 100), SHARD),
    "shard cut by a byte": (lambda b: os.truncate(b.shard, b.shard.stat().st_size - 1), SHARD),
    "shard longer by a byte": (lambda b: b.text(b.shard, b.shard.read_bytes() + b"\0"), SHARD),
    "shard a directory": (lambda b: b.instead(b.shard, Path.mkdir), SHARD),
    "shard a FIFO": (lambda b: b.instead(b.shard, os.mkfifo), SHARD),
    "shard a socket": (lambda b: b.instead(b.shard, unix_socket), SHARD),
    "shard an endless device": (lambda b: b.instead(b.shard, lambda p: p.symlink_to("/dev/zero")), SHARD),
    "header longer than its file": (lambda b: b.length(b.shard, 1 << 20), SHARD),
    "header of negative length": (lambda b: b.length(b.shard, 2**64 - 1), SHARD),
    "header of length 2^63": (lambda b: b.length(b.shard, 2**63), SHARD),
    "header of length 0": (lambda b: b.length(b.shard, 0), SHARD),
    "header of 2 GB": (lambda b: (b.length(b.shard, 2 << 30), os.truncate(b.shard, 3 << 30)), SHARD),
    "header not JSON": (lambda b: b.header(b.shard, lambda _: b"{]"), SHARD),
    "header not UTF-8": (lambda b: b.header(b.shard, lambda _: b'{"\xff":{}}'), SHARD),
    "header with half a character": (lambda b: b.header(b.shard, lambda _: b'{"\\udc00":{}}'), SHARD),
    "header an array": (lambda b: b.header(b.shard, lambda _: b"[]"), SHARD),
    "header nested deep": (lambda b: b.header(b.shard, lambda _: b'{"a":' + b"[" * 200_000), SHARD),
    "header names a tensor twice": (twice_in_the_header, NORM),
    "metadata not text": (lambda b: b.header(b.shard, lambda t: t.update(__metadata__={"a": 1})), SHARD),
    "entry a list": (lambda b: b.header(b.shard, lambda t: t.update({NORM: []})), NORM),
    "entry without a shape": (lambda b: b.header(b.shard, lambda t: t[NORM].pop("shape")), NORM),
    "entry with a field more": (entry(stride=[1]), NORM),
    "unknown dtype": (entry(dtype="F31"), NORM),
    "dtype a list": (entry(dtype=["F32"]), NORM),
    "dtype of another width": (entry(dtype="F64"), NORM),
    "shape of negative sizes": (entry(shape=[-2, -4]), NORM),
    "shape of fractions": (entry(shape=[8.0]), NORM),
    "shape of other size": (entry(shape=[9]), NORM),
    "shape that overflows": (entry(shape=[2**62, 2**62, 4]), NORM),
    "shape that overflows to its size": (entry(shape=[2**61 + 1, 8]), NORM),
    "shape of nothing times too much": (entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), NORM),
    "shape of a million axes": (entry(shape=[2**62] * 100_000), NORM),
    "shape a number": (entry(shape=8), NORM),
    "range backwards": (entry(data_offsets=[32, 0]), NORM),
    "range negative": (entry(data_offsets=[-32, 0]), NORM),
    "range of 2^63": (entry(data_offsets=[2**63, 2**63 + 32]), NORM),
    "range of one number": (entry(data_offsets=[0]), NORM),
    "ranges with a gap or overlap": (moved, SHARD),
    "two tensors on one range": (lambda b: b.header(b.shard, lambda t: t.update(twin=t[NORM])), SHARD),
    "no tensors at all": (lambda b: b.header(b.shard, lambda t: t.clear()), SHARD),
    "companion a link to nothing": (lambda b: (b.base / "merges.txt").symlink_to("gone"), "merges.txt"),
    "companion a FIFO": (lambda b: os.mkfifo(b.base / "vocab.json"), "vocab.json"),
    "companion a device": (lambda b: (b.base / "vocab.json").symlink_to("/dev/zero"), "vocab.json"),
    "companion of a name no text can hold": (lambda b: (b.base / "a\udcff.txt").touch(), "\\udcff.txt"),
    "companion a link in circles": (lambda b: (b.base / "LICENSE").symlink_to("LICENSE"), "LICENSE"),
}  # fmt: skip


KINDS = {**CONFIG, **BUILT, **INDEX, **SHARDS}


@pytest.mark.filterwarnings("ignore")  # transformers warns of its own affairs
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_base_is_refused_in_one_line(kind: str, bench: Any, refused: Callable[[Any], str]) -> None:
    spoil, named = KINDS[kind]
    spoil(bench)
    assert named in refused(bench)


@pytest.mark.parametrize("kind", ["quantised by gptq", "index leads up", "shard cut by a byte", "shard a FIFO"])
def test_nor_does_an_adapter_for_it_appear(kind: str, bench: Any, refused: Callable[[Any], str]) -> None:
    spoil, named = KINDS[kind]
    spoil(bench)
    bench.args = ["--as", "adapter"]
    assert named in refused(bench)


def test_links_to_files_elsewhere_are_read_and_left_alone(
    bench: Any, looked: Any, ported: Callable[[Any], Any]
) -> None:
    """A hub cache is made of such links: what they lead to is read, copied as a file, never altered."""
    blobs = bench.folder / "in" / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(bench.base.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    before = looked(bench.folder / "in")
    ported(bench)
    assert looked(bench.folder / "in") == before
    assert not any(path.is_symlink() for path in bench.out.iterdir())
    assert json.loads((bench.out / "config.json").read_text())["model_type"] == "llama"
