"""Every way a patch is broken, or is more than portllm ports: one line that names it, and nothing touched."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Spoil = Callable[[Any], object]

MODULE = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}.lora_"
LORA, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
ENDLESS = "(([a-z_0-9.]+)+)+!"


def config(**keys: Any) -> Spoil:
    """The adapter's config says something else."""
    return lambda b: b.edit(b.lora, **keys)


def has(name: str, *shape: int, dtype: str | None = None) -> Spoil:
    """The adapter has this tensor, of random values or of another dtype."""
    width = {"F8_E4M3": 1, "I8": 1, "I32": 4}.get(dtype or "", 0)
    return lambda b: b.put(
        b.adapter, name, (dtype, shape, bytes(width * math.prod(shape))) if width else b.values(*shape)
    )


def lacks(name: str) -> Spoil:
    return lambda b: b.put(b.adapter, name, None)


def lora(b: Any, module: str, rows: int = 8, columns: int = 8) -> None:
    """LoRA on one more module."""
    b.put(b.adapter, f"base_model.model.{module}.lora_A.weight", b.values(2, columns))
    b.put(b.adapter, f"base_model.model.{module}.lora_B.weight", b.values(rows, 2))
    b.edit(b.lora, target_modules=["q_proj", "v_proj", "down_proj", module])


def both_huge(b: Any) -> None:
    b.filled(b.adapter, f"{MODULE}.lora_A", 3e38)
    b.filled(b.adapter, f"{MODULE}.lora_B", 3e38)


def convolution(b: Any) -> None:
    b.put(b.adapter, f"{KEY}A.weight", b.values(2, 8, 3, 3))
    b.put(b.adapter, f"{KEY}B.weight", b.values(8, 2, 1, 1))


def again(tree: dict[str, Any]) -> str:
    """The end of a header that names a tensor once more."""
    return f', "{KEY}A.weight": {json.dumps(tree[f"{KEY}A.weight"])}}}'


def other_family(b: Any) -> None:
    b.rename(b.adapter, "model.layers.0.self_attn.", "transformer.h.0.attn.")
    b.rename(b.adapter, "model.layers.1.self_attn.", "transformer.h.1.attn.")
    b.rename(b.adapter, "model.layers", "transformer.h")


REFUSED: dict[str, tuple[Spoil, str]] = {
    **{
        f"method {kind}": (config(peft_type=kind), kind)
        for kind in ("ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "PREFIX_TUNING", "PROMPT_TUNING", "XLORA")
    },
    "method lora in small letters": (config(peft_type="lora"), "lora"),
    "method null": (config(peft_type=None), "peft_type"),
    "method not said": (lambda b: b.without(b.lora, "peft_type"), "peft_type"),
    "method a list": (config(peft_type=["LORA"]), "peft_type"),
    "aLoRA": (config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "layer replication": (config(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "QALoRA": (config(use_qalora=True), "use_qalora"),
    "LoftQ": (config(init_lora_weights="loftq"), "loftq"),
    "CorDA": (config(init_lora_weights="corda"), "corda"),
    "LoRA-GA": (config(init_lora_weights="lora_ga"), "lora_ga"),
    "PiSSA by a few steps of SVD": (config(init_lora_weights="pissa_niter_16"), "pissa_niter_16"),
    "PiSSA without the old base": (config(init_lora_weights="pissa"), "--from"),
    "OLoRA without the old base": (config(init_lora_weights="olora"), "--from"),
    "initialisation unheard of": (config(init_lora_weights="moonshine"), "moonshine"),
    "Arrow": (config(arrow_config={"top_k": 3}), "arrow_config"),
    "BD-LoRA": (config(use_bdlora={"blocks": 2}), "bdlora"),
    "Megatron": (config(megatron_config={"a": 1}), "megatron_config"),
    "a feature unheard of": (config(use_moonshine=True), "use_moonshine"),
    "a feature unheard of, in colour": (config(**{"use\x1b[31m\n": True}), "use"),
    "bias unheard of": (config(bias="some"), "bias"),
    "LoRA on a convolution": (convolution, MODULE),
    "magnitude without DoRA": (has(f"{KEY}magnitude_vector", 8), f"{KEY}magnitude_vector"),
    "DoRA without its magnitudes": (config(use_dora=True), "magnitude"),
    "DoRA at another scale": (lambda b: (config(use_dora=True)(b), setattr(b, "args", ["--scale", "0.5"])), ""),
}

CONFIG: dict[str, tuple[Spoil, str]] = {
    "config absent": (lambda b: b.lora.unlink(), LORA),
    "config empty": (lambda b: b.text(b.lora, ""), LORA),
    "config not JSON": (lambda b: b.text(b.lora, "{"), LORA),
    "config an array": (lambda b: b.text(b.lora, "[1]"), LORA),
    "config not UTF-8": (lambda b: b.text(b.lora, b"\xff{}"), LORA),
    "config nested deep": (lambda b: b.text(b.lora, '{"r":' * 100_000), LORA),
    "config of gigabytes": (lambda b: os.truncate(b.lora, 5 << 30), LORA),
    "config a FIFO": (lambda b: b.instead(b.lora, os.mkfifo), LORA),
    "config a directory": (lambda b: b.instead(b.lora, Path.mkdir), LORA),
    "config a device": (lambda b: b.instead(b.lora, lambda p: p.symlink_to("/dev/zero")), LORA),
    "r zero": (config(r=0), "r of model.layers"),
    "r negative": (config(r=-2), "r of model.layers"),
    "r text": (config(r="2"), "r"),
    "r a fraction": (config(r=2.5), "r"),
    "r true": (config(r=True), "r"),
    "r null": (config(r=None), "r"),
    "r beyond every number": (config(r=10**400), "r"),
    "r another than the tensors'": (config(r=4), "down_proj: lora_A"),
    "alpha NaN": (config(lora_alpha=math.nan), "lora_alpha"),
    "alpha infinite": (config(lora_alpha=math.inf), "lora_alpha"),
    "alpha text": (config(lora_alpha="16"), "lora_alpha"),
    "alpha null": (config(lora_alpha=None), "lora_alpha"),
    "alpha beyond every number": (config(lora_alpha=10**400), "lora_alpha"),
    "rank_pattern a list": (config(rank_pattern=[4]), "rank_pattern"),
    "rank_pattern to nothing": (config(rank_pattern={"q_proj": 0}), "r"),
    "alpha_pattern to infinity": (config(alpha_pattern={"q_proj": math.inf}), "alpha"),
    "alpha_pattern no expression": (config(alpha_pattern={"q_proj(": 4}), "q_proj("),
    "rank_pattern without end": (config(rank_pattern={ENDLESS: 4}), "rank_pattern"),
    "target_modules without end": (config(target_modules=ENDLESS), "target_modules"),
    "exclude_modules without end": (config(exclude_modules=ENDLESS), "exclude_modules"),
    "target_modules no expression": (config(target_modules="(q_proj"), "(q_proj"),
    "target_modules a number": (config(target_modules=7), "target_modules"),
    "target_modules that PEFT would not match": (config(target_modules=["v_proj", "down_proj"]), MODULE),
    "target_modules excluded": (config(exclude_modules=["q_proj"]), MODULE),
    "layers that are not trained": (config(layers_to_transform=[1]), "model.layers.0"),
    "layers_to_transform text": (config(layers_to_transform="all"), "layers_to_transform"),
}

TENSORS: dict[str, tuple[Spoil, str]] = {
    "adapter absent": (lambda b: b.adapter.unlink(), ADAPTER),
    "adapter empty": (lambda b: b.text(b.adapter, b""), ADAPTER),
    "adapter without tensors": (lambda b: b.text(b.adapter, b"\2" + bytes(7) + b"{}"), ADAPTER),
    "adapter cut by a byte": (lambda b: os.truncate(b.adapter, b.adapter.stat().st_size - 1), ADAPTER),
    "adapter of an endless header": (lambda b: b.length(b.adapter, 2**63), ADAPTER),
    "adapter a directory": (lambda b: b.instead(b.adapter, Path.mkdir), ADAPTER),
    "adapter a FIFO": (lambda b: b.instead(b.adapter, os.mkfifo), ADAPTER),
    "adapter a device": (lambda b: b.instead(b.adapter, lambda p: p.symlink_to("/dev/zero")), ADAPTER),
    "adapter a pickle": (lambda b: b.pickles(b.patch, "adapter_model.bin"), "adapter_model.bin"),
    "no lora_B": (lacks(f"{KEY}B.weight"), f"{MODULE} has no lora_B"),
    "no lora_A": (lacks(f"{KEY}A.weight"), f"{MODULE} has no lora_A"),
    "a factor C": (has(f"{KEY}C.weight", 2, 8), f"{MODULE}.lora_C"),
    "a tensor of no module": (has("base_model.model.extra", 2), "base_model.model.extra"),
    "another prefix": (lambda b: b.rename(b.adapter, "base_model.model.", ""), "lora_A.weight"),
    "an adapter's name": (lambda b: b.rename(b.adapter, "_A.weight", "_A.default.weight"), "name (default)"),
    "a module without a name": (lambda b: lora(b, ""), ".lora_A"),
    "A of one axis": (has(f"{KEY}A.weight", 16), MODULE),
    "A of no axis": (has(f"{KEY}A.weight"), MODULE),
    "A and B of two ranks": (has(f"{KEY}B.weight", 8, 3), MODULE),
    "A turned": (has(f"{KEY}A.weight", 8, 2), MODULE),
    "B taller than the base": (has(f"{KEY}B.weight", 9, 2), MODULE),
    "A wider than the base": (has(f"{KEY}A.weight", 2, 9), MODULE),
    "A without columns": (has(f"{KEY}A.weight", 2, 0), MODULE),
    "A of integers": (has(f"{KEY}A.weight", 2, 8, dtype="I32"), f"{KEY}A.weight"),
    "A in fp8": (has(f"{KEY}A.weight", 2, 8, dtype="F8_E4M3"), f"{KEY}A.weight"),
    "NaN in A": (lambda b: b.filled(b.adapter, f"{MODULE}.lora_A", math.nan), f"{KEY}A.weight"),
    "infinity in B": (lambda b: b.filled(b.adapter, f"{MODULE}.lora_B", -math.inf), f"{KEY}B.weight"),
    "a sum beyond float32": (both_huge, f"{MODULE}.weight"),
    "NaN in the base under the patch": (
        lambda b: b.filled(b.shard, f"{MODULE}.weight", math.nan),
        f"{MODULE}.weight holds NaN",
    ),
    "infinity in the base under the patch": (
        lambda b: b.filled(b.shard, f"{MODULE}.weight", math.inf),
        f"{MODULE}.weight holds NaN or infinity",
    ),
    "a module the base lacks": (lambda b: lora(b, "model.layers.2.self_attn.q_proj"), "model.layers.2.self_attn"),
    "another family's modules": (other_family, "transformer.h.0"),
    "a module in colour": (lambda b: lora(b, "model.\x1b[31m\nx"), "model."),
    "a module right to left": (lambda b: lora(b, "model.\u202egnp.proj"), "model."),
    "a module of a long name": (lambda b: lora(b, "model." + "x" * 100_000), "model.x"),
    "LoRA on a norm": (lambda b: lora(b, "model.norm"), "model.norm"),
    "LoRA on a whole layer": (lambda b: lora(b, "model.layers.0"), "model.layers.0"),
    "one tensor twice": (lambda b: b.header(b.adapter, lambda t: (json.dumps(t)[:-1] + again(t)).encode()), KEY),
}  # fmt: skip

RECORD = {"schema_version": 1, "task": "t", "base": {"name": "v0", "fingerprint": "0" * 64}, "fingerprint": "1" * 64}


def record(tree: Any = None, **changes: Any) -> Spoil:
    """A patch.json, with some of its keys changed or another tree altogether."""
    text = json.dumps({**RECORD, **changes}) if tree is None else tree
    return lambda b: b.text(b.patch / "patch.json", text)


def trained_elsewhere(b: Any) -> None:
    record()(b)
    b.args = ["--from", str(b.old)]


RECORDS: dict[str, tuple[Spoil, str]] = {
    "record not JSON": (record("{"), "patch.json"),
    "record empty": (record(""), "patch.json"),
    "record an array": (record("[]"), "patch.json"),
    "record nested deep": (record('{"task":' * 100_000), "patch.json"),
    "record of a later schema": (record(schema_version=99), "patch.json"),
    "record with a key more": (record(more=1), "patch.json"),
    "record without a base": (record(base=None), "patch.json"),
    "record with an empty base": (record(base={}), "patch.json"),
    "record with a base of text": (record(base="v0"), "patch.json"),
    "record with a base of numbers": (record(base={"name": 5, "fingerprint": 7}), "patch.json"),
    "record without a fingerprint": (record(fingerprint=None), "patch.json"),
    "record with a task of numbers": (record(task=[1]), "patch.json"),
    "record a FIFO": (lambda b: os.mkfifo(b.patch / "patch.json"), "patch.json"),
    "record a directory": (lambda b: (b.patch / "patch.json").mkdir(), "patch.json"),
    "record a link to nothing": (lambda b: (b.patch / "patch.json").symlink_to("gone"), "patch.json"),
    "trained on another base than --from": (trained_elsewhere, "old"),
}

KINDS = {**REFUSED, **CONFIG, **TENSORS, **RECORDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_patch_is_refused_in_one_line(
    kind: str, bench: Any, refused: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portllm.checkpoint.adapter.patterns.SECONDS", 0.3)
    spoil, named = KINDS[kind]
    spoil(bench)
    assert named in refused(bench)


UNSUMMED = {"a sum beyond float32", "NaN in the base under the patch", "infinity in the base under the patch"}


@pytest.mark.parametrize("kind", sorted(TENSORS.keys() - UNSUMMED)[::4])
def test_nor_is_it_retargeted(kind: str, bench: Any, refused: Callable[[Any], str]) -> None:
    spoil, named = KINDS[kind]
    spoil(bench)
    bench.args = ["--as", "adapter"]
    assert named in refused(bench)
