"""A patch is read with PEFT's own scaling; what is not sound or not supported is refused by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from portllm.checkpoint.adapter.config import HARMLESS, MAX_BYTES, REFUSED, TYPES
from portllm.checkpoint.adapter.patch import Patch, scaling
from portllm.checkpoint.files.hashing import fingerprint
from portllm.checkpoint.record.records import PatchRecord, Source
from portllm.errors import (
    CheckpointError,
    PatchError,
    PortllmError,
    ShapeError,
    UnmatchedModulesError,
    UnsafeFileError,
    UnsupportedPatchError,
)

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
Make = Callable[..., Path]


def pair(rank: int = 2, rows: int = 4, columns: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(rank, columns), torch.full((rows, rank), 2.0)


def test_reads_pairs_lazily(tmp_path: Path, make_patch: Make) -> None:
    patch = Patch.open(make_patch(tmp_path / "p", {Q: pair(), V: pair(rows=7)}))
    assert list(patch.modules) == [Q, V]
    assert patch.modules[V].shape == (7, 3)
    assert patch.modules[V].rank == 2
    assert patch.modules[Q].scaling == 2.0
    assert torch.equal(patch.modules[Q].b, pair()[1])
    assert patch.record is None


def test_record_of_ours_is_read(tmp_path: Path, make_patch: Make) -> None:
    folder = make_patch(tmp_path / "p", {Q: pair()})
    record = PatchRecord(task="t", base=Source(name="old", fingerprint="1" * 64), fingerprint="2" * 64)
    record.write(folder)
    assert Patch.open(folder).record == record
    (folder / "patch.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"patch\.json: not readable"):
        Patch.open(folder)


PATTERNS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 1}},
    {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 4}, "use_rslora": True},
    {"rank_pattern": {r"layers\.1\..*": 3}, "alpha_pattern": {"self_attn.q_proj": 7, "q_proj": 9}},
    {"rank_pattern": {"proj": 4, "attn.q_proj": 5, "layers.0": 6}},
    {"alpha_pattern": {r"model\.layers\.\d+\.self_attn\.(q|v)_proj": 32}},
]


@pytest.mark.parametrize("config", PATTERNS)
@pytest.mark.filterwarnings("ignore")  # importing peft warns
def test_scaling_is_pefts_own(config: dict[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

    inner = torch.nn.Module()
    inner.layers = torch.nn.ModuleList([Layer(), Layer()])
    root = torch.nn.Module()
    root.model = inner
    keys = {"r": 2, "lora_alpha": 5, "rank_pattern": {}, "alpha_pattern": {}, **config}
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"], **keys), root)
    for name in (Q, "model.layers.0.self_attn.v_proj", V, "model.layers.1.self_attn.q_proj"):
        module = root.get_submodule(name)
        assert scaling(keys, name) == (module.r["default"], module.scaling["default"])


INITS = ("pissa_niter_4", "corda", "loftq", "lora_ga", "a_start_of_next_year")

FEATURES: dict[str, dict[str, Any]] = {
    "peft_type 'IA3'": {"peft_type": "IA3"},
    "peft_type 'ADALORA'": {"peft_type": "ADALORA"},
    "peft_type 'TRAINABLE_TOKENS'": {"peft_type": "TRAINABLE_TOKENS"},
    "peft_type None": {"peft_type": None},
    "layer_replication=": {"layer_replication": [[0, 1]]},
    "megatron_config=": {"megatron_config": {"x": 1}},
    "alora_invocation_tokens=": {"alora_invocation_tokens": [1]},
    "use_qalora=True": {"use_qalora": True},
    "arrow_config=": {"arrow_config": {"top_k": 1}},
    "use_bdlora=": {"use_bdlora": {"nblocks": 2}},
    "kasa_config=": {"kasa_config": {"beta": 1}},
    "velora_config=": {"velora_config": {"num_groups": 1}},
    "monteclora_config=": {"monteclora_config": {"x": 1}},
    "enable_lora=": {"enable_lora": [True, False, True]},
    "a_key_of_next_year=": {"a_key_of_next_year": 1},
    **{f"init_lora_weights={init} ": {"init_lora_weights": init} for init in INITS[:-1]},
    f"init_lora_weights='{INITS[-1]}' ": {"init_lora_weights": INITS[-1]},
    "init_lora_weights=pissa with target_parameters": {"init_lora_weights": "pissa", "target_parameters": ["a.b"]},
}


@pytest.mark.parametrize("name", FEATURES)
def test_unsupported_configurations_are_refused_by_name(name: str, tmp_path: Path, make_patch: Make) -> None:
    with pytest.raises(UnsupportedPatchError) as error:
        Patch.open(make_patch(tmp_path / "p", {Q: pair()}, **FEATURES[name]))
    assert name in str(error.value)
    assert "adapter_config.json" in str(error.value)
    assert len(str(error.value).split(";")) + len(str(error.value).split(": ")) > 3, "no next step"


def test_the_config_of_the_first_peft_is_read(tmp_path: Path, make_patch: Make) -> None:
    first = {"enable_lora": None, "merge_weights": False, "modules_to_save": None, "target_modules": ["q_proj"]}
    patch = Patch.open(make_patch(tmp_path / "p", {Q: pair()}, fan_in_fan_out=False, init_lora_weights=True, **first))
    assert list(patch.modules) == [Q]


def test_every_key_of_pefts_config_is_known() -> None:
    from dataclasses import fields

    from peft import LoraConfig

    assert {f.name for f in fields(LoraConfig)} <= set(TYPES) | HARMLESS | set(REFUSED)


@pytest.mark.parametrize(
    ("init", "kind"),
    [(init, "plain") for init in (True, False, None, "gaussian", "orthogonal", "eva", "mica")]
    + [("pissa", "pissa"), ("olora", "olora")],
)
def test_initialisations_that_can_be_ported(init: Any, kind: str, tmp_path: Path, make_patch: Make) -> None:
    extra = {"corda_config": {"corda_method": "ipm"}, "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}}
    folder = make_patch(tmp_path / "p", {Q: pair()}, init_lora_weights=init, **extra)
    assert Patch.open(folder).init == kind


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.embed_tokens.lora_embedding_A", "model.embed_tokens has no lora_embedding_B"),
        (f"{Q}.lora_magnitude_vector", "use_dora"),
        (f"{Q}.lora_B.bias", "lora_bias"),
        (f"{Q}.bias", "bias=none"),
        ("model.norm.bias", "bias=none"),
        (f"{Q}.base_layer.bias", "bias=none"),
        ("lm_head.base_layer.weight", "lm_head has 0 of LoRA's wrappers"),
        ("lm_head.token_adapter.base_layer.weight", "lm_head has 0 of LoRA's wrappers"),
        ("score.modules_to_save.weight", "modules_to_save"),
        ("lm_head.original_module.weight", "modules_to_save"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices names .* 0 times"),
        (f"{Q}.base_layer.lora_A.weight", "gives .* no LoRA"),
        (f"{Q}.base_layer.out_proj.lora_A.weight", "inside another module"),
        (f"{Q}.lora_A.default.weight", "is not PEFT's LoRA"),
        (f"{Q}.lora_A.scale", "is not PEFT's LoRA"),
        (f"{Q}.weight", "is not PEFT's LoRA"),
        ("a" * 2000, "is not PEFT's LoRA"),
    ],
)
def test_tensors_that_the_config_does_not_explain_are_refused(
    key: str, message: str, tmp_path: Path, make_patch: Make
) -> None:
    folder = make_patch(tmp_path / "p", {Q: pair()}, extra={f"base_model.model.{key}": torch.ones(2, 2)})
    with pytest.raises(PatchError, match=message) as error:
        Patch.open(folder)
    assert key.partition(".lora")[0][:100] in str(error.value)


def test_three_weights_without_a_reason_are_no_copies_of_embeddings(tmp_path: Path, make_patch: Make) -> None:
    names = ("model.embed_tokens", "lm_head", "model.third")
    extra = {f"base_model.model.{name}.weight": torch.ones(5, 2) for name in names}
    with pytest.raises(UnmatchedModulesError, match=r"model\.third\.weight .* at most"):
        Patch.open(make_patch(tmp_path / "p", {Q: pair()}, extra=extra))
    del extra["base_model.model.model.third.weight"]
    assert set(Patch.open(make_patch(tmp_path / "q", {Q: pair()}, extra=extra)).saved) == {
        "model.embed_tokens",
        "lm_head",
    }


def test_a_key_without_the_prefix_is_refused(tmp_path: Path, make_patch: Make) -> None:
    with pytest.raises(PatchError, match=r"tensor model\.q\.lora_A\.weight is not"):
        Patch.open(make_patch(tmp_path / "p", {Q: pair()}, extra={"model.q.lora_A.weight": torch.ones(2, 2)}))


def test_half_a_pair_is_refused(tmp_path: Path, make_patch: Make) -> None:
    extra = {f"base_model.model.{V}.lora_A.weight": torch.ones(2, 3)}
    with pytest.raises(PatchError, match=f"{V} has no lora_B"):
        Patch.open(make_patch(tmp_path / "p", {Q: pair()}, extra=extra))


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (pair(rank=3), {}),
        ((torch.ones(2, 3), torch.ones(4, 3)), {}),
        (pair(), {"rank_pattern": {"q_proj": 8}}),
    ],
)
def test_shapes_must_agree_with_the_rank(
    tensors: tuple[torch.Tensor, torch.Tensor], config: dict[str, Any], tmp_path: Path, make_patch: Make
) -> None:
    with pytest.raises(ShapeError, match=f"{Q}: lora_A is .* expected r="):
        Patch.open(make_patch(tmp_path / "p", {Q: tensors}, **config))


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 1, 1), (2, 3, 1, 1, 1)])
def test_a_convolution_is_refused(shape: tuple[int, ...], tmp_path: Path, make_patch: Make) -> None:
    with pytest.raises(UnsupportedPatchError, match="LoRA on a convolution"):
        Patch.open(make_patch(tmp_path / "p", {Q: (torch.ones(shape), torch.ones(4, *shape[1:]))}))


@pytest.mark.parametrize("tensors", [(torch.ones(0), torch.ones(0)), (torch.ones(2, 0), torch.ones(4, 2))])
def test_factors_that_were_not_gathered_are_refused(
    tensors: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, make_patch: Make
) -> None:
    with pytest.raises(ShapeError, match="DeepSpeed or FSDP"):
        Patch.open(make_patch(tmp_path / "p", {Q: tensors}))


@pytest.mark.parametrize(
    "config",
    [{"r": 0}, {"r": "8"}, {"r": True}, {"r": 2**40}, {"r": None}, {"lora_alpha": None}, {"lora_alpha": "16"}]
    + [{"lora_alpha": value} for value in (float("nan"), float("inf"), 10**400)]
    + [{"rank_pattern": value} for value in (["q_proj"], {"(": 4}, {"q_proj": "4"}, {"q_proj": 0})]
    + [{"alpha_pattern": {"q_proj": [1]}}, {"alpha_pattern": {"*": 1}}]
    + [{key: 1} for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "target_modules", "revision")]
    + [{key: [1]} for key in ("modules_to_save", "target_parameters", "exclude_modules", "target_modules")]
    + [{key: "x"} for key in ("target_parameters", "modules_to_save", "layers_to_transform", "bias", "lora_dropout")]
    + [{"trainable_token_indices": value} for value in ([-1], [1.5], "1", {"a": 1}, {"a": [True]})]
    + [{"layers_pattern": "layers"}, {"target_modules": "x", "layers_to_transform": [1]}]
    + [{"use_dora": True, "lora_bias": True}, {"init_lora_weights": 1}, {"modules_to_save": ["(a+)+"]}]
    + [{"target_modules": "("}, {"exclude_modules": "["}, {"peft_type": ["LORA"]}],
    ids=str,
)
def test_the_config_is_checked(config: dict[str, Any], tmp_path: Path, make_patch: Make) -> None:
    with pytest.raises(PatchError, match="adapter_config.json"):
        Patch.open(make_patch(tmp_path / "p", {Q: pair()}, **config))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float, tmp_path: Path, make_patch: Make) -> None:
    a, b = pair()
    b[3, 1] = bad
    with pytest.raises(PatchError, match=r"lora_B\.weight holds NaN or infinity"):
        _ = Patch.open(make_patch(tmp_path / "p", {Q: (a, b)})).modules[Q].b


def test_whole_numbers_are_refused(tmp_path: Path, make_patch: Make) -> None:
    a, b = pair()
    with pytest.raises(PatchError, match="dtype I32"):
        Patch.open(make_patch(tmp_path / "p", {Q: (a.int(), b)}))


def test_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path, make_patch: Make) -> None:
    folder = make_patch(tmp_path / "p", {Q: pair()})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeFileError, match=r"adapter_model\.bin: is a pickle.*weights_only=True.*save_file"):
        Patch.open(folder)


def test_directory_must_be_whole(tmp_path: Path, make_patch: Make) -> None:
    with pytest.raises(PatchError, match="found nothing"):
        Patch.open(tmp_path / "nowhere")
    folder = make_patch(tmp_path / "p", {Q: pair()})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(PatchError, match=r"has no adapter_model\.safetensors"):
        Patch.open(folder)
    (folder / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(PortllmError, match="expected a JSON object"):
        Patch.open(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(PatchError, match=r"has no adapter_config\.json"):
        Patch.open(folder)
    with pytest.raises(PatchError, match="holds no tensors"):
        Patch.open(make_patch(tmp_path / "empty", {}))


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": "LORA", "r": 2, "r": 4}',
        '{"peft_type": "\\ud800"}',
        "[" * 100_000,
        '{"r": ' + "9" * 5000 + "}",
        "\xff",
    ],
    ids=["twice", "half a character", "deep", "long number", "no JSON"],
)
def test_a_config_that_is_not_sound_json_is_refused(text: str, tmp_path: Path, make_patch: Make) -> None:
    folder = make_patch(tmp_path / "p", {Q: pair()})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(PortllmError, match=r"adapter_config\.json: not readable JSON"):
        Patch.open(folder)


def test_a_huge_config_is_refused_unread(tmp_path: Path, make_patch: Make) -> None:
    folder = make_patch(tmp_path / "p", {Q: pair()})
    with (folder / "adapter_config.json").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PatchError, match=f"has {MAX_BYTES + 1} bytes"):
        Patch.open(folder)


def named(folder: Path, adapters: dict[str, str]) -> None:
    """Rename the tensors in `folder` as they are named in memory: by the name of their adapter."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        module = next(module for module in adapters if module in key)
        part, _, leaf = key.rpartition(".")
        split = (part, f".{leaf}") if leaf in ("weight", "bias") else (key, "")
        tensors[f"{split[0]}.{adapters[module]}{split[1]}"] = value
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_adapters_name_in_the_tensors_is_refused_with_the_command_that_takes_it_off(
    tmp_path: Path, make_patch: Make
) -> None:
    """issue 8, item 13: it was told "holds no tensors of LoRA … train the patch again"."""
    extra = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 11),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(3, 2),
        f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(4),
    }
    folder = make_patch(tmp_path / "it's", {Q: pair()}, extra=extra)
    weights = folder / "adapter_model.safetensors"
    plain = fingerprint(folder)
    named(folder, {"model.": "my task"})
    with pytest.raises(PatchError) as caught:
        Patch.open(folder)
    said = str(caught.value)
    assert said.startswith(f"{weights}: tensor names carry an adapter's name (my task)")
    assert "expected model.embed_tokens.lora_embedding_A, found model.embed_tokens.lora_embedding_A.my task" in said
    command = said.partition("; remove it with: ")[2]
    subprocess.run(["/bin/sh", "-c", command.replace("python ", f"{sys.executable} ", 1)], check=True)
    assert fingerprint(folder) == plain
    assert [path.name for path in folder.iterdir() if path.suffix == ".new"] == []


def test_two_adapters_in_one_file_are_refused(tmp_path: Path, make_patch: Make) -> None:
    """issue 8, item 13."""
    folder = make_patch(tmp_path / "p", {Q: pair(), V: pair()})
    named(folder, {Q: "default", V: "other"})
    with pytest.raises(PatchError, match=r"an adapter's name \(default, other\).*selected_adapters"):
        Patch.open(folder)
