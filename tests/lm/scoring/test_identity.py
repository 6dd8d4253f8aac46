"""What a score depends on: whatever can change it changes the identity, and nothing else does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from portllm.lm.scoring import identity

Made = Callable[..., Path]


def tensors() -> dict[str, object]:
    import torch

    return {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "modeling_own.py", "merges.txt"]
)
def test_a_file_that_loading_reads_is_part_of_it(tmp_path: Path, make_checkpoint: Made, name: str) -> None:
    folder = make_checkpoint(tmp_path / "m", tensors())
    before = identity.of_weights(folder)
    (folder / name).write_text("{} ")
    assert identity.of_weights(folder) != before


@pytest.mark.parametrize("name", ["README.md", "port.json", "release.json", "pytorch_model.bin", ".gitattributes"])
def test_a_file_that_says_nothing_to_a_model_is_not(tmp_path: Path, make_checkpoint: Made, name: str) -> None:
    folder = make_checkpoint(tmp_path / "m", tensors())
    before = identity.of_weights(folder)
    (folder / name).write_text("x")
    assert identity.of_weights(folder) == before


def test_shards_are_of_no_consequence_and_values_are(tmp_path: Path, make_checkpoint: Made) -> None:
    one = identity.of_weights(make_checkpoint(tmp_path / "one", tensors()))
    two = identity.of_weights(make_checkpoint(tmp_path / "two", tensors(), shards=[["b.weight"], ["a.weight"]]))
    other = {**tensors(), "a.weight": tensors()["a.weight"] * 2}  # type: ignore[operator]
    assert one == two != identity.of_weights(make_checkpoint(tmp_path / "three", other))


def test_a_patch_s_configuration_is_part_of_it(tmp_path: Path, make_patch: Made) -> None:
    import torch

    pairs = {"q_proj": (torch.ones(2, 4), torch.ones(4, 2))}
    four, eight = (identity.of_weights(make_patch(tmp_path / str(a), pairs, lora_alpha=a)) for a in (4, 8))
    assert four["fingerprint"] == eight["fingerprint"]
    assert four != eight


def test_words_are_the_tokenizer_s_files_alone(tmp_path: Path, make_checkpoint: Made) -> None:
    folder = make_checkpoint(tmp_path / "m", tensors())
    (folder / "tokenizer.json").write_text("{}")
    assert set(identity.of_words(folder)) == {"tokenizer.json"}


def test_a_task_s_definition_is_that_of_the_installed_harness() -> None:
    assert "default.yaml" in identity.of_definition("sst2")
    assert "preprocess_winogrande.py" in identity.of_definition("winogrande")
    assert identity.of_definition("no_such_task_anywhere") == {}


def test_a_changed_file_shows_in_its_folder_s_state(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1")
    before = identity.state(tmp_path)
    assert identity.state(tmp_path) == before
    file.write_text("2")
    assert identity.state(tmp_path) != before


def test_none_of_it_needs_the_heavy_libraries() -> None:
    asked = "identity.of_code(); identity.of_device(); identity.of_definition('gsm8k')"
    heavy = "{'torch', 'transformers', 'lm_eval', 'peft', 'datasets'} & set(sys.modules)"
    script = "import sys\nfrom portllm.lm.scoring import identity, ledger\n" + (
        f"{asked}\nsys.exit(str({heavy}) if {heavy} else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
