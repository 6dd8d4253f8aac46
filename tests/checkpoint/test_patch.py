"""Plain LoRA is read with PEFT's own scaling; everything else is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from portllm.checkpoint.patch import Patch, scaling
from portllm.checkpoint.records import PatchRecord, Source
from portllm.errors import CheckpointError, PatchError, PortllmError, ShapeError, UnsafeFileError, UnsupportedPatchError

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


FEATURES: dict[str, dict[str, Any]] = {
    "peft_type 'IA3'": {"peft_type": "IA3"},
    "peft_type 'ADALORA'": {"peft_type": "ADALORA"},
    "peft_type None": {"peft_type": None},
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
    "use_dora=True": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
    "modules_to_save=": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices=": {"trainable_token_indices": [1]},
    "target_parameters=": {"target_parameters": ["experts.down_proj"]},
    "layer_replication=": {"layer_replication": [[0, 1]]},
    "megatron_config=": {"megatron_config": {"x": 1}},
    "alora_invocation_tokens=": {"alora_invocation_tokens": [1]},
    "use_qalora=True": {"use_qalora": True},
    "arrow_config=": {"arrow_config": {"top_k": 1}},
    "use_bdlora=": {"use_bdlora": {"nblocks": 2}},
    "kasa_config=": {"kasa_config": {"beta": 1}},
    "monteclora_config=": {"monteclora_config": {"x": 1}},
    "a_key_of_next_year=": {"a_key_of_next_year": 1},
    "init_lora_weights=pissa ": {"init_lora_weights": "pissa"},
    "init_lora_weights=pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights=olora": {"init_lora_weights": "olora"},
    "init_lora_weights=corda": {"init_lora_weights": "corda"},
    "init_lora_weights=eva": {"init_lora_weights": "eva"},
    "init_lora_weights=loftq": {"init_lora_weights": "loftq"},
    "init_lora_weights=lora_ga": {"init_lora_weights": "lora_ga"},
    "init_lora_weights=1": {"init_lora_weights": 1},
}


@pytest.mark.parametrize("name", FEATURES)
def test_unsupported_configurations_are_refused_by_name(name: str, tmp_path: Path, make_patch: Make) -> None:
    with pytest.raises(UnsupportedPatchError) as error:
        Patch.open(make_patch(tmp_path / "p", {Q: pair()}, **FEATURES[name]))
    assert name in str(error.value)
    assert "adapter_config.json" in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.embed_tokens.lora_embedding_A", "embedding"),
        (f"{Q}.lora_magnitude_vector", "DoRA"),
        (f"{Q}.lora_B.bias", "lora_bias"),
        (f"{Q}.bias", "biases"),
        ("score.modules_to_save.weight", "modules_to_save"),
        ("model.embed_tokens.weight", "saved embeddings"),
        ("lm_head.base_layer.weight", "saved copy"),
        ("model.embed_tokens.trainable_tokens_delta", "trainable_token_indices"),
        (f"{Q}.lora_A.default.weight", "is not PEFT's LoRA"),
        (f"{Q}.weight", "is not PEFT's LoRA"),
    ],
)
def test_tensors_that_are_not_plain_lora_are_refused(key: str, message: str, tmp_path: Path, make_patch: Make) -> None:
    folder = make_patch(tmp_path / "p", {Q: pair()}, extra={f"base_model.model.{key}": torch.ones(2, 2)})
    with pytest.raises(PatchError, match=message) as error:
        Patch.open(folder)
    assert key in str(error.value)


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
        ((torch.ones(2, 3, 1), torch.ones(4, 2)), {}),
        (pair(), {"rank_pattern": {"q_proj": 8}}),
    ],
)
def test_shapes_must_agree_with_the_rank(
    tensors: tuple[torch.Tensor, torch.Tensor], config: dict[str, Any], tmp_path: Path, make_patch: Make
) -> None:
    with pytest.raises(ShapeError, match=f"{Q}: lora_A is .* expected r="):
        Patch.open(make_patch(tmp_path / "p", {Q: tensors}, **config))


@pytest.mark.parametrize(
    "config",
    [{"r": 0}, {"r": "8"}, {"r": True}, {"lora_alpha": None}, {"lora_alpha": "16"}, {"lora_alpha": float("nan")}]
    + [{"rank_pattern": ["q_proj"]}, {"rank_pattern": {"(": 4}}],
)
def test_numbers_of_the_config_are_checked(config: dict[str, Any], tmp_path: Path, make_patch: Make) -> None:
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
