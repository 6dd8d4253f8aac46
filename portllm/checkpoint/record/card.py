"""The model cards of patches and ported directories, in the hub's format (YAML front matter, then Markdown).

All text from files (names, tasks, licences) is quoted: it can break neither the YAML nor the Markdown.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portllm.checkpoint.files.hashing import file_digest
from portllm.checkpoint.files.headers import Header, read_header
from portllm.checkpoint.files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, CONFIG
from portllm.checkpoint.files.reading import open_input, read_json_object
from portllm.checkpoint.record.provenance import is_hub_name
from portllm.checkpoint.record.records import PatchRecord, PortRecord, Source
from portllm.checkpoint.record.serving import VERSION, serving
from portllm.errors import CheckpointError

# front matter is read as lines, not as YAML: only a plain word after the key is accepted
PLAIN = re.compile(
    r"""(?P<key>license|license_name|license_link):[ \t]*(?P<q>["']?)(?P<value>[\w./:+-]{1,200})(?P=q)[ \t]*"""
)
FRONT_BYTES = 1 << 16
LONGEST_NAME = 200
# the end of an architecture's name, or a patch's task_type → (auto class, pipeline tag)
TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """The facts of a card that are not in the record: from the written files, the base's card and patch.json."""

    config: Mapping[str, Any] = field(default_factory=dict)  # of the written model, or of the base
    adapter: tuple[Mapping[str, Any], Header] | None = None  # its config and its tensors
    license: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, base: Path, patch: Path) -> Facts:
        """Return the facts from the directory being written, the base and the patch. Raises CheckpointError."""
        adapter, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
        trained = PatchRecord.find(patch)
        return cls(
            config=read_json_object((base if adapter.is_file() else folder) / CONFIG),
            adapter=(read_json_object(adapter), read_header(weights)) if adapter.is_file() else None,
            license=_license(base / CARD),
            data=trained.data if trained is not None else {},
        )


def complete(record: PortRecord, folder: Path, base: Path, patch: Path) -> PortRecord:
    """Write the card and port.json of what is in `folder`, which makes it complete; return the record of both.

    `base` and `patch` are the directories it was made from. Raises CheckpointError, OSError.
    """
    (folder / CARD).write_text(port_card(record, Facts.of(folder, base, patch)), encoding="utf-8")
    files = {**record.files, CARD: file_digest(folder / CARD, "blake3")}
    record = dataclasses.replace(record, files=dict(sorted(files.items())))
    record.write(folder)
    return record


def port_card(record: PortRecord, facts: Facts | None = None) -> str:
    """Return README.md of a ported checkpoint or patch: base, lineage, use and checks; equal for equal inputs."""
    facts = facts or Facts()
    merged = record.output == "merged"
    auto, tag = _task(facts)
    front = {
        "base_model": _base_model(record.base),
        "base_model_relation": "finetune" if merged else "adapter",
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": tag,
        **facts.license,
        "datasets": _datasets(facts.data),
        "tags": ["portllm", "lora"],
    }
    use = _use_merged(auto) if merged else _use_adapter(record, auto, facts)
    return "\n".join([*_front(front), *_body(record, facts, merged), *use]) + "\n"


def patch_card(record: PatchRecord) -> str:
    """Return README.md of a newly trained patch: its base, its data and how to port it to the next release."""
    front = {
        "base_model": _base_model(record.base),
        "library_name": "peft",
        "datasets": _datasets(record.data),
        "tags": ["portllm", "lora"],
    }
    rows = record.metrics.get("rows", 0)
    lines = [
        *_front(front),
        f"# {quoted(record.task)} on {quoted(record.base.name)}",
        "",
        f"A LoRA patch trained on {rows:.0f} rows of {quoted(record.task)}; the loss covered the answers only.",
        "",
        "| what | fingerprint |",
        "|---|---|",
        f"| the base, {quoted(record.base.name)} | {record.base.fingerprint} |",
        f"| the patch | {record.fingerprint} |",
        *(f"| the data, {quoted(name)} | {quoted(digest)} |" for name, digest in record.data.items()),
        "",
        "Parameters and package versions are in patch.json. To put the patch onto the next release of its base:",
        "",
        "    portllm port PATCH --onto NEW_BASE --out PORTED",
    ]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Return `text` as a Markdown code span on one line, inert also in a table."""
    plain = "".join(c if c.isprintable() else "\ufffd" for c in text[:LONGEST_NAME]) + (
        "…" * (len(text) > LONGEST_NAME)
    )
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    space = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{ticks}{space}{plain.replace('|', chr(92) + '|')}{space}{ticks}"


def _front(front: Mapping[str, Any]) -> list[str]:
    return ["---", *(f"{key}: {_yaml(value)}" for key, value in front.items() if value), "---", ""]


def _yaml(value: Any) -> str:
    """Return a string or a list of strings as YAML in one line: double-quoted, unprintable characters escaped."""
    if not isinstance(value, str):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    return '"' + "".join(_escaped(character) for character in value) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    return "\ufffd" if 0xD800 <= ord(character) < 0xE000 else f"\\U{ord(character):08x}"


def _body(record: PortRecord, facts: Facts, merged: bool) -> list[str]:
    operation = "added to the weights of" if merged else "re-targeted to"
    return [
        f"# {quoted(record.patch.name)} on {quoted(record.base.name)}",
        "",
        f"A LoRA patch{_for(record.task)}, {operation} a release of its base model without training, by portllm "
        f"(method {quoted(record.method)}, scale {record.scale:g}; PortLLM, arXiv:2410.10870).",
        "",
        "## Lineage",
        "",
        "| what | name | fingerprint |",
        "|---|---|---|",
        _row("base", record.base),
        _row("patch", record.patch),
        _row("the patch was trained on", record.trained_on),
        *(f"| the patch's data | {quoted(name)} | {quoted(digest)} |" for name, digest in sorted(facts.data.items())),
        *([f"| this model | | {record.fingerprint} |"] if record.fingerprint else []),
        "",
        "## Verified when this directory was written",
        "",
        *(f"- {check}" for check in _checks(record, merged)),
        "",
        "To check that it is still so, and to compute changed tensors again from scratch:",
        "",
        "    portllm verify THIS_DIRECTORY --onto BASE --patch PATCH",
        "",
        "Whether the task's quality carried over was not measured here: evaluate it.",
        "",
    ]


def _checks(record: PortRecord, merged: bool) -> Iterable[str]:
    matched, total = record.modules.get("matched", 0), record.modules.get("total", 0)
    yield f"{matched} of the base's {total} modules are changed by the patch; every patch tensor is used exactly once"
    yield "every shape was compared before anything was written, and every value is finite"
    if merged:
        changed, copied = record.tensors.get("changed", 0), record.tensors.get("copied", 0)
        yield f"{changed} tensors changed, each rounded once; {copied} tensors are byte-identical to the base's"
    yield "the BLAKE3 of every file is in port.json"


def _use_merged(auto: str) -> list[str]:
    return [
        "## Use",
        "",
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("THIS_DIRECTORY_OR_REPO", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY_OR_REPO")',
        "```",
    ]


def _use_adapter(record: PortRecord, auto: str, facts: Facts) -> list[str]:
    revision = f", revision={_yaml(record.base.revision)}" if record.base.revision else ""
    return [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained({_yaml(record.base.name[:LONGEST_NAME])}{revision}, dtype="auto")',
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY_OR_REPO")',
        "```",
        *(_vllm(*facts.adapter) if facts.adapter is not None else []),
    ]


def _vllm(config: Mapping[str, Any], header: Header) -> list[str]:
    """Return the lines about serving the adapter with vLLM, according to vLLM's source code."""
    support = serving(config, header)
    lines = ["", "## In vLLM", ""]
    if support.obstacles:
        return [
            *lines,
            f"Not as it is (vLLM {VERSION}, by its sources; not run): {'; '.join(support.obstacles)}. Port it merged "
            "(`--as merged`) and serve that.",
        ]
    rank = f" --max-lora-rank {support.max_lora_rank}" if support.max_lora_rank else ""
    lines += [
        f"Within what vLLM {VERSION} takes, by its sources (not run):",
        "",
        f"    vllm serve BASE --enable-lora{rank} --lora-modules NAME=THIS_DIRECTORY",
    ]
    if support.depends:
        lines += ["", f"Whether it takes {' and '.join(support.depends)} depends on its class of this model."]
    return lines


def _task(facts: Facts) -> tuple[str, str | None]:
    """Return (transformers' auto class, the hub's pipeline tag or None where the table has none)."""
    kinds = [str(facts.adapter[0].get("task_type"))] if facts.adapter is not None else []
    architectures = facts.config.get("architectures")
    kinds += [str(name) for name in architectures] if isinstance(architectures, list) else []
    for kind in kinds:
        for suffix, task in TASKS.items():
            if kind.endswith(suffix):
                return task
    if facts.config.get("is_encoder_decoder") is True:
        return "AutoModelForSeq2SeqLM", None
    return "AutoModel", None


def _license(card: Path) -> dict[str, str]:
    """Return the licence fields in the front matter of the base's card, where they are plain words."""
    try:
        with open_input(card) as file:
            lines = file.read(FRONT_BYTES).decode("utf-8", "replace").splitlines()
    except (OSError, CheckpointError):
        return {}
    if not lines or lines[0].rstrip() != "---" or "---" not in (rest := [line.rstrip() for line in lines[1:]]):
        return {}
    matches = (PLAIN.fullmatch(line) for line in rest[: rest.index("---")])
    fields = {match["key"]: match["value"] for match in matches if match}
    if "license" not in fields:
        return {}
    return {key: value for key, value in sorted(fields.items()) if key == "license" or fields["license"] == "other"}


def _base_model(base: Source) -> list[str]:
    # only a checkpoint of the hub has a revision: a local directory's name could be another owner's model
    return [base.name] if base.revision and is_hub_name(base.name) else []


def _datasets(data: Mapping[str, str]) -> list[str]:
    names = {name.rpartition("/")[0] or name for name in data}
    return sorted(name for name in names if is_hub_name(name))


def _for(task: str | None) -> str:
    return f" for {quoted(task)}" if task else ""


def _row(what: str, source: Source | None) -> str:
    if source is None:
        return f"| {what} | not known | not known |"
    name = quoted(source.name) + (f" @ {quoted(source.revision)}" if source.revision else "")
    return f"| {what} | {name} | {source.fingerprint or 'not known'} |"
