"""A base made ready for training: its precision, its attention, and a LoRA on the modules that are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portllm.errors import MachineError, ParamsError
from portllm.lm.learning import llama, loading
from portllm.params import ArchitectureParams, LoraParams, OptimParams
from portllm.world import tokenizer

SHAPE = ArchitectureParams(hidden_size=16, intermediate_size=32, layers=2, heads=2)


def small() -> Any:
    return llama.new_llama(tokenizer.build(), SHAPE, seed=0)


def gpt2() -> Any:
    """A model whose linears are transformers' Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "vproj"), r"vproj matches no module .*; did you mean v_proj"),
        (("q_proj", "V_proj"), r"V_proj matches no module .*; did you mean v_proj"),
        (("layers.0.self_attn.qproj",), r"layers\.0\.self_attn\.qproj matches .*; did you mean q_proj"),
        (("q_proj", "norm"), r"norm matches no module of the base that LoRA adapts; .*The base has down_proj, "),
        (("self_attn", "q_proj"), r"self_attn matches no module of the base that LoRA adapts"),
        (("all-linear",), r"all-linear matches no module"),
        ((".*_proj",), r"\.\*_proj matches no module"),
        ((), r"expected the name of a module or more, found none"),
    ],
)
def test_target_without_a_module_names_the_nearest(targets: tuple[str, ...], message: str) -> None:
    """Issue 8, item 3: PEFT ignores a misspelt target while another one matches."""
    with pytest.raises(ParamsError, match=rf"lora\.target_modules: {message}") as caught:
        loading.add_lora(small(), LoraParams(target_modules=targets), seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [(("q_proj", "v_proj"), 4), (("layers.0.self_attn.q_proj",), 1), (("embed_tokens", "lm_head"), 2)],
)
def test_targets_that_match_are_adapted(targets: tuple[str, ...], adapted: int) -> None:
    model = loading.add_lora(small(), LoraParams(target_modules=targets), seed=0)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * adapted


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_targets_of_another_architecture_are_its_own() -> None:
    """Issue 8, item 3."""
    loading.add_lora(gpt2(), LoraParams(target_modules=("c_attn",)), seed=0)
    with pytest.raises(ParamsError, match="q_proj matches no module .*The base has c_attn, c_fc, c_proj"):
        loading.add_lora(gpt2(), LoraParams(), seed=0)


def test_precision_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, bf16, auto in ((False, False, "fp32"), (True, False, "fp32"), (True, True, "bf16")):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        # a Turing GPU emulates bf16, and reports it as supported by default
        monkeypatch.setattr(
            "torch.cuda.is_bf16_supported", lambda including_emulation=True, bf16=bf16: bf16 or including_emulation
        )
        assert loading.computes_in("auto") == auto
        assert loading.computes_in("fp32") == "fp32"
        if cuda and not bf16:
            with pytest.raises(MachineError, match="bf16 needs"):
                loading.computes_in("bf16")
        else:
            assert loading.computes_in("bf16") == "bf16"


def test_flash_attention_with_fp32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "there")
    optim = OptimParams(attention="flash_attention_2", precision="fp32")
    with pytest.raises(ParamsError, match="flash_attention_2 computes in bf16"):
        loading.attention_for(None, optim)


def test_misspelt_target_leaves_nothing(tmp_path: Path) -> None:
    """Issue 8, item 3: a patch and a release trained by LoRA alike, from the command line."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from click.testing import CliRunner

    from portllm import cli
    from portllm.params import PrepareParams
    from portllm.verbs import prepare

    small().save_pretrained(tmp_path / "base")
    tokenizer.build().save_pretrained(tmp_path / "base")
    prepare.run(
        dataset="world_sst2", out=tmp_path / "data" / "world_sst2", params=PrepareParams(train_rows=20, test_rows=40)
    )
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"text": ["Anna opens the school at nine."] * 40}), tmp_path / "corpus" / "train.parquet")
    before = sorted(tmp_path.iterdir())
    shared = ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--lora-target-modules", "q_proj,vproj"]
    for words in (
        ["train", "--task", "world_sst2", "--data", str(tmp_path / "data")],
        ["evolve", "--corpus", str(tmp_path / "corpus"), "--mode", "lora"],
    ):
        done = CliRunner().invoke(cli.main, ["--no-track", *words, *shared])
        assert done.exit_code == 1
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert "did you mean v_proj" in done.stderr
        assert sorted(tmp_path.iterdir()) == before
