"""Cards the hub can read, that say what is known, and that nothing in a file can turn into something else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.checkpoint.files.headers import Header
from portllm.checkpoint.files.tensors import TensorEntry, TensorFile
from portllm.checkpoint.record.card import Facts, patch_card, port_card, quoted
from portllm.checkpoint.record.records import PatchRecord, PortRecord, Source
from portllm.checkpoint.record.serving import serving
from portllm.params import PortParams
from portllm.verbs import port

RECORD = PortRecord(
    base=Source(name="mistralai/Mistral-7B-v0.3", fingerprint="b" * 64, revision="c" * 40),
    patch=Source(name="my-patch", fingerprint="a" * 64),
    trained_on=Source(name="mistralai/Mistral-7B-v0.1", fingerprint=None),
    task="boolq", fingerprint="d" * 64,
    modules={"matched": 2, "total": 7}, tensors={"changed": 2, "copied": 9},
)  # fmt: skip
HOSTILE = [
    "a\n---\nlicense: mit", 'x"\nbase_model: evil', "`code` | cell | <script>alert(1)</script>", "[a](javascript:1)",
    "\x1b[31mred", "\u2028\u202e\ud800", "\\", "``` \n# heading", "😀 | |", "x" * 5000, "# not a heading", "<!--", "'",
]  # fmt: skip


def front(card: str) -> dict[str, Any]:
    start, matter, _ = card.split("---\n", 2)
    assert start == ""
    tree = yaml.safe_load(matter)
    assert isinstance(tree, dict)
    return tree


def header(*names: str, rank: int = 8) -> Header:
    file = TensorFile(Path("adapter_model.safetensors"), 0, 0)
    shapes = {n: (rank, 4) if "lora_A" in n else (4, rank) for n in names}
    entries = {n: TensorEntry(n, "F32", shape, 0, 16 * rank, file) for n, shape in shapes.items()}
    return Header(Path("adapter_model.safetensors"), 0, 0, entries, {})


PLAIN = ("base_model.model.l.q_proj.lora_A.weight", "base_model.model.l.q_proj.lora_B.weight")


def test_the_front_matter_is_the_hubs() -> None:
    facts = Facts(
        config={"architectures": ["MistralForCausalLM"]}, license={"license": "apache-2.0"},
        data={"google/boolq/train.parquet": "e" * 64, "boolq/test.parquet": "f" * 64},
    )  # fmt: skip
    assert front(port_card(RECORD, facts)) == {
        "base_model": ["mistralai/Mistral-7B-v0.3"], "base_model_relation": "finetune", "library_name": "transformers",
        "pipeline_tag": "text-generation", "license": "apache-2.0", "datasets": ["boolq", "google/boolq"],
        "tags": ["portllm", "lora"],
    }  # fmt: skip
    adapter = dataclasses.replace(RECORD, output="adapter")
    tree = front(port_card(adapter, Facts(adapter=({"task_type": "SEQ_CLS"}, header(*PLAIN)))))
    assert (tree["base_model_relation"], tree["library_name"]) == ("adapter", "peft")
    assert tree["pipeline_tag"] == "text-classification"


def test_what_is_not_known_is_left_out_or_said() -> None:
    for name in ("models/releases/v1", "new-base"):  # the hub refuses paths, and a directory's name is not a model's
        local = dataclasses.replace(RECORD, base=Source(name=name, fingerprint=None), trained_on=None)
        card = port_card(local)
        assert set(front(card)) == {"base_model_relation", "library_name", "tags"}
        assert "| the patch was trained on | not known | not known |" in card
        assert f"`{name}`" in card


def test_the_lineage_names_everything() -> None:
    card = port_card(RECORD, Facts(data={"boolq/train.parquet": "e" * 64}))
    for part in (
        "`mistralai/Mistral-7B-v0.3` @ `" + "c" * 40,
        "b" * 64,
        "a" * 64,
        "e" * 64,
        "d" * 64,
        "my-patch",
        "boolq",
    ):
        assert part in card
    assert card == port_card(RECORD, Facts(data={"boolq/train.parquet": "e" * 64}))


def structure(card: str) -> list[Any]:
    """The blocks and inline elements a Markdown reader sees below the front matter, without their texts."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(card.split("---\n", 2)[2])
    return [(token.type, token.tag, [child.type for child in token.children or []]) for token in tokens]


def cards(name: str) -> list[str]:
    """Cards of every kind, with `name` wherever a file could have put it."""
    source = Source(name=name, fingerprint="b" * 64, revision=name)
    record = PortRecord(base=source, patch=source, trained_on=source, task=name, method=name)
    adapter = Facts(data={name: name}, adapter=({"task_type": name}, header(*PLAIN)))
    return [
        port_card(record, Facts(data={name: name}, config={"architectures": [name]})),
        port_card(dataclasses.replace(record, output="adapter"), adapter),
        patch_card(PatchRecord(task=name, base=source, fingerprint="a" * 64, data={name: name})),
    ]


@pytest.mark.parametrize("evil", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_stays_a_name(evil: str) -> None:
    for card, harmless in zip(cards(evil), cards("x"), strict=True):
        assert structure(card) == structure(harmless)
        assert set(front(card)) <= set(front(harmless))
        assert all(c.isprintable() or c == "\n" for c in card)
        card.encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_one_closed_code_span_and_any_yaml_string_comes_back(text: str) -> None:
    if text:
        kinds = structure(f"---\n---\n| a | b |\n|---|---|\n| {quoted(text)} | x |\n")
        assert kinds == structure(f"---\n---\n| a | b |\n|---|---|\n| {quoted('name')} | x |\n")
    facts = Facts(license={"license": text}) if text else Facts()
    assert front(port_card(RECORD, facts)).get("license", "") == text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ('---\ntags: [x]\nlicense: "mit"  \n---\n', {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
         {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}),
        ("---\nlicense: mit\nlicense_name: x\n---\n", {"license": "mit"}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense: *anchor\n---\n", {}),
        ("---\n  license: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("license: mit\n", {}),
        ("---\n---\nlicense: mit\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_the_licence_is_the_bases_where_it_is_a_plain_word(
    card: str, expected: dict[str, str], tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    base = make_checkpoint(tmp_path / "base", {"lm_head.weight": torch.ones(2, 2)})
    (base / "README.md").write_text(card)
    assert Facts.of(base, base, tmp_path).license == expected


@pytest.mark.parametrize(
    ("config", "names", "rank", "obstacles", "told"),
    [
        ({}, PLAIN, 8, [], None),
        ({}, PLAIN, 16, [], None),
        ({}, PLAIN, 17, [], 32),
        ({}, PLAIN, 300, [], 320),
        ({}, PLAIN, 513, ["ranks up to 512"], None),
        ({"use_dora": True}, (*PLAIN, "base_model.model.l.q_proj.lora_magnitude_vector"), 8, ["DoRA"], None),
        ({"bias": "all"}, (*PLAIN, "base_model.model.l.q_proj.bias"), 8, ["trained biases"], None),
        ({"lora_bias": True}, (*PLAIN, "base_model.model.l.q_proj.lora_B.bias"), 8, ["trained biases"], None),
        ({"modules_to_save": ["score"]}, (*PLAIN, "base_model.model.score.weight"), 8, ["modules_to_save"], None),
        ({}, (*PLAIN, "base_model.model.norm.weight"), 8, ["modules_to_save"], None),
        ({"trainable_token_indices": [1]}, PLAIN, 8, ["trained tokens"], None),
        ({"alpha_pattern": {"q": 3}}, PLAIN, 8, ["one rank and one alpha"], None),
    ],
)  # fmt: skip
def test_what_vllm_takes(
    config: dict[str, Any], names: tuple[str, ...], rank: int, obstacles: list[str], told: Any
) -> None:
    found = serving(config, header(*names, rank=rank))
    assert len(found.obstacles) == len(obstacles)
    assert all(part in text for part, text in zip(obstacles, found.obstacles, strict=True))
    if not obstacles:
        assert found.max_lora_rank == told
    card = port_card(dataclasses.replace(RECORD, output="adapter"), Facts(adapter=(config, header(*names, rank=rank))))
    assert ("Not as it is" in card) == bool(obstacles)
    assert (f"--max-lora-rank {told}" in card) == (told is not None and not obstacles)


def test_what_depends_on_vllms_class_is_said() -> None:
    names = (
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
    )
    found = serving({"target_parameters": ["experts.w"]}, header(*names))
    assert found.obstacles == ()
    assert len(found.depends) == 2


def test_the_snippets_run(tmp_path: Path) -> None:
    adapter = Facts(adapter=({"task_type": "CAUSAL_LM"}, header(*PLAIN)))
    for output, facts in (
        ("merged", Facts(config={"architectures": ["T5ForConditionalGeneration"]})),
        ("adapter", adapter),
    ):
        card = port_card(dataclasses.replace(RECORD, output=output), facts)
        code = card.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
    assert "AutoModelForCausalLM" in code
    assert 'revision="' + "c" * 40 in code


def test_a_port_writes_the_card(
    tmp_path: Path, make_checkpoint: Callable[..., Path], make_patch: Callable[..., Path]
) -> None:
    module = "model.layers.0.self_attn.q_proj"
    base = make_checkpoint(
        tmp_path / "base", {f"{module}.weight": torch.ones(4, 4), "lm_head.weight": torch.ones(11, 4)}
    )
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    patch = make_patch(tmp_path / "patch", {module: (torch.ones(2, 4), torch.ones(4, 2))}, target_modules=["q_proj"])
    for output in ("merged", "adapter"):
        port.run(patch=patch, onto=base, out=tmp_path / output, params=PortParams(as_=output))
        tree = front((tmp_path / output / "README.md").read_text())
        assert (tree["license"], tree["pipeline_tag"]) == ("mit", "text-generation")
        assert json.loads((tmp_path / output / "port.json").read_text())["files"]["README.md"]
