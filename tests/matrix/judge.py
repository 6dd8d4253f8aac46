"""The judge: what a ported checkpoint has to be, according to transformers and PEFT and to nothing of portllm.

A patch is made by PEFT on the old base, with seeded random values in place of training. What is right is what PEFT's
*unmerged* adapter computes on the new base; for PiSSA and OLoRA, which alter the base they start from, it is the new
base plus the difference that the adapter makes to the old one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import load_file

from tests.matrix.architectures import ARCHITECTURES, VOCABULARY, Architecture

OLD, NEW = 0, 1  # the seeds of the two bases: as different as can be
PREFIX = "base_model.model."
# A logit may differ by this share of what the patch does to the logits. Rounding in float32 through two layers was
# measured at up to 6e-6 of it, and any one module left out at 4e-2 and more (llava's eyes apart: see NARROW).
TOLERANCE = 1e-4
TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForImageTextToText": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
}
LABELS = 3


@dataclass(frozen=True)
class Case:
    """One cell of the matrix: a configuration of PEFT on an architecture, and what the port owes."""

    architecture: str
    feature: str
    lora: Mapping[str, Any]
    refused: str | None = None  # a regular expression that the error matches; None: the port has to be right
    source: bool = False  # the port needs the old base
    residual: bool = False  # the adapter's start was taken out of the old base
    copies: bool = False  # PEFT puts copies of the old base's embedding layers next to the adapter
    vocabulary: int = VOCABULARY  # of the tuned model
    edit: Mapping[str, Any] = field(default_factory=dict)  # changes of adapter_config.json after saving
    config: Mapping[str, Any] = field(default_factory=dict)  # what the port changes of config.json

    @property
    def arch(self) -> Architecture:
        """The architecture by its name."""
        return ARCHITECTURES[self.architecture]

    @property
    def changed_config(self) -> Mapping[str, Any]:
        """What the port changes of config.json: what the case says, and the class of a classifier."""
        if TASKS[self.arch.auto] != "SEQ_CLS" or self.arch.saved_as is None:
            return self.config
        stem = {"llama": "Llama", "gpt2": "GPT2"}[self.arch.model_type]
        labels = [f"LABEL_{i}" for i in range(LABELS)]
        return {
            **self.config,
            "architectures": [f"{stem}ForSequenceClassification"],
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }

    def __str__(self) -> str:
        return f"{self.architecture}-{self.feature}"


class Bench:
    """Bases of a test session, each made once, and the models that judge."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = functools.cache(self._base)
        self.bare = functools.cache(self._bare)

    def _base(self, architecture: str, seed: int, dtype: torch.dtype = torch.float32) -> Path:
        folder = self.root / f"{architecture}-{seed}-{str(dtype).rpartition('.')[2]}"
        return ARCHITECTURES[architecture].save(folder, seed, dtype)

    def _bare(self, architecture: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Logits of the new base without any patch."""
        return logits(load(ARCHITECTURES[architecture], self.base(architecture, NEW, dtype)))

    def patch(self, case: Case, folder: Path, copies: bool = False) -> Path:
        """The adapter of `case`, made on the old base, as PEFT saves it."""
        from peft import LoraConfig, get_peft_model

        model = load(case.arch, self.base(case.architecture, OLD))
        if case.vocabulary != VOCABULARY:
            model.resize_token_embeddings(case.vocabulary, mean_resizing=False)  # seeded by load
        config = LoraConfig(task_type=TASKS[case.arch.auto], **{"r": 4, "lora_alpha": 8, **case.lora})
        tuned = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(7)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                # a magnitude stays positive
                parameter.data += noise * parameter.data if "magnitude" in name else noise
        tuned.save_pretrained(folder, save_embedding_layers=copies)
        if case.edit:
            tree = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**tree, **case.edit}))
        return folder

    def patches(self, case: Case, folder: Path) -> tuple[Path, Path]:
        """The adapter to port, and the same one as the judge reads it: without copies of the base, as PEFT made it."""
        patch = self.patch(case, folder / "patch", copies=case.copies)
        if not case.copies and not case.edit:
            return patch, patch
        return patch, self.patch(dataclasses.replace(case, edit={}), folder / "bare")

    def tuned(
        self, case: Case, patch: Path, dtype: torch.dtype = torch.float32, *, plain: bool = False
    ) -> torch.nn.Module:
        """The new base with PEFT's unmerged adapter on it: what is right. `plain`: the adapter left its base alone."""
        from peft import PeftModel

        model = load(case.arch, self.base(case.architecture, NEW, dtype))
        if case.residual and not plain:
            return self._shifted(case, patch, model)
        if case.vocabulary != VOCABULARY:
            model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
            self._new_rows(case, model)
        return PeftModel.from_pretrained(model, str(patch)).eval()

    def _new_rows(self, case: Case, model: torch.nn.Module) -> None:
        # the rows that only the tuned model has are what they were when it was tuned: those of the resized old base
        old = load(case.arch, self.base(case.architecture, OLD))
        old.resize_token_embeddings(case.vocabulary, mean_resizing=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.shape[0] == case.vocabulary:
                    parameter[VOCABULARY:] = old.get_parameter(name)[VOCABULARY:]

    def _shifted(self, case: Case, patch: Path, model: Any) -> Any:
        from peft import PeftModel

        old = load(case.arch, self.base(case.architecture, OLD))
        before = {name: tensor.double() for name, tensor in old.state_dict().items()}
        after = PeftModel.from_pretrained(old, str(patch)).merge_and_unload().state_dict()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(tensor.double() + after[name].double() - before[name])
        return model


def load(arch: Architecture, folder: Path) -> Any:
    """A checkpoint as users load it, in float32."""
    torch.manual_seed(0)  # of what the checkpoint lacks
    config = json.loads((folder / "config.json").read_text())
    more = {"num_labels": LABELS} if arch.auto.endswith("Classification") and "id2label" not in config else {}
    return arch.auto_class.from_pretrained(folder, dtype=torch.float32, **more).eval()


def logits(model: Any) -> torch.Tensor:
    """What the model makes of a prompt in which every token of its vocabulary occurs, token 0 apart."""
    tokens = torch.arange(1, VOCABULARY - 1)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(3))].view(2, -1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary > VOCABULARY:
        tokens = torch.cat([tokens, torch.arange(VOCABULARY, vocabulary).view(2, -1)], dim=1)
    more = {"decoder_input_ids": tokens.flip(0, 1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **more).logits


def effect(case: Case, bench: Bench, expected: torch.Tensor) -> float:
    """How far the patch moves the logits of the new base: the scale on which errors count."""
    bare = bench.bare(case.architecture)
    moved = (expected[..., : bare.shape[-1]][:, : bare.shape[1]] - bare).abs().max().item()
    assert moved > 0.02 * bare.abs().max().item(), "the patch has almost no effect: the case could not fail"
    return moved


def assert_logits(found: torch.Tensor, expected: torch.Tensor, scale: float) -> None:
    """Equal to rounding, on the scale of what the patch does."""
    assert found.shape == expected.shape
    error = (found - expected).abs().max().item()
    assert error <= TOLERANCE * scale, f"logits are off by {error / scale:.2g} of the patch's effect"


def touched(model: Any, patch: Path) -> set[str]:
    """Parameters of the base, by their names in memory, that PEFT's adapter on `model`, read from `patch`, alters."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    names = _biases(patch)
    for name, module in model.base_model.model.named_modules(remove_duplicate=False):
        name = name.replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            names.add(f"{name}.{module.parameter_name}")
        elif isinstance(module, LoraLayer):
            names.add(f"{name}.weight")
            names |= {f"{name}.bias"} if any(module.lora_bias.values()) else set()
        elif isinstance(module, ModulesToSaveWrapper):
            names |= {f"{name}.{key}" for key, _ in module.original_module.named_parameters()}
        elif isinstance(module, TrainableTokensWrapper):
            names.add(f"{name}.weight")
    return names


def _biases(patch: Path) -> set[str]:
    # those that PEFT saved complete (bias=all, bias=lora_only)
    keys = load_file(patch / "adapter_model.safetensors").keys()
    plain = {key for key in keys if key.endswith(".bias") and ".lora_" not in key and "modules_to_save" not in key}
    return {key.removeprefix(PREFIX).replace(".base_layer", "") for key in plain}


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor on disk, by file and name."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_files(new: Path, out: Path) -> None:
    """Same tensors in the same files as the base's, apart from added ones; port.json counts and digests them."""
    before, after = shards(new), shards(out)
    assert after.keys() == before.keys()
    for name in before:
        assert before[name].keys() <= after[name].keys()
    old = {key: tensor for shard in before.values() for key, tensor in shard.items()}
    written = {key: tensor for shard in after.values() for key, tensor in shard.items()}
    same = {key for key, tensor in old.items() if _bytes(tensor) == _bytes(written[key])}
    record = json.loads((out / "port.json").read_text())
    assert record["tensors"] == {"changed": len(written) - len(same), "copied": len(same)}
    assert 0 < record["modules"]["matched"] <= record["modules"]["total"]
    index = out / "model.safetensors.index.json"
    if index.is_file():
        tree = json.loads(index.read_text())
        assert tree["weight_map"] == {key: name for name, shard in after.items() for key in shard}
    present = {path.name for path in out.iterdir()} - {"port.json"}
    assert record["files"] == {name: blake3((out / name).read_bytes()).hexdigest() for name in present}


def _bytes(tensor: torch.Tensor) -> bytes:
    return str(tensor.dtype).encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()


def differing(before: Any, after: Any) -> set[str]:
    """Names in memory of the parameters that differ between two models."""
    old, new = before.state_dict(), after.state_dict()
    return {name for name, tensor in new.items() if name not in old or not torch.equal(old[name], tensor)}


def exact(case: Case, bench: Bench, patch: Path, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """Every parameter of the tuned new base in float64, merged by PEFT itself, in float64 throughout."""
    from peft import PeftModel

    model = load(case.arch, bench.base(case.architecture, NEW, dtype)).double()
    model = PeftModel.from_pretrained(model, str(patch), autocast_adapter_dtype=False).double()
    result: Mapping[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return result
