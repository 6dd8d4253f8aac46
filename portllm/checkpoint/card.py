"""The model cards of patches and ported directories, in the hub's format (YAML front matter, then Markdown)."""

from __future__ import annotations

import json
from typing import Any

from portllm.checkpoint.records import PatchRecord, PortRecord, Source


def port_card(record: PortRecord) -> str:
    """README.md of a ported checkpoint or patch: base, lineage, what was verified; a function of the record alone."""
    merged = record.output == "merged"
    front = {
        "base_model": [record.base.name],
        "base_model_relation": "finetune" if merged else "adapter",
        "library_name": "transformers" if merged else "peft",
        "tags": ["portllm", "lora"],
    }
    return "\n".join(_front(front) + _body(record, merged)) + "\n"


def patch_card(record: PatchRecord) -> str:
    """README.md of a patch just trained: its base, its data and how to move it to the next release."""
    front = {"base_model": [record.base.name], "library_name": "peft", "tags": ["portllm", "lora"]}
    rows = record.metrics.get("rows", 0)
    lines = [
        *_front(front),
        f"# {record.task} on {record.base.name}",
        "",
        f"A LoRA patch trained on {rows:.0f} rows of {record.task}; the loss covered the answers only.",
        "",
        "| what | fingerprint |",
        "|---|---|",
        f"| the base, {record.base.name} | {record.base.fingerprint} |",
        f"| the patch | {record.fingerprint} |",
        *(f"| the data, {name} | {digest} |" for name, digest in record.data.items()),
        "",
        "Parameters and package versions are in patch.json. To put the patch onto the next release of its base:",
        "",
        "    portllm port PATCH --onto NEW_BASE --out PORTED",
    ]
    return "\n".join(lines) + "\n"


def _front(front: dict[str, Any]) -> list[str]:
    return ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]


def _body(record: PortRecord, merged: bool) -> list[str]:
    trained = record.trained_on
    how = "added to the weights of" if merged else "re-targeted, unchanged, to"
    checks = [
        f"{record.modules['matched']} of the base's {record.modules['total']} linear modules are changed by the patch; "
        "every patch tensor is used exactly once",
        "every shape was compared before anything was written, and every value is finite",
    ]
    if merged:
        checks += [
            f"{record.tensors['changed']} tensors changed: base + scale · Δ, rounded once; "
            f"{record.tensors['copied']} tensors are byte-identical to the base's",
        ]
    return [
        f"# {record.patch.name} on {record.base.name}",
        "",
        f"A LoRA patch, {how} a release of its base model without training, by portllm "
        f"(method {record.method}, scale {record.scale:g}; PortLLM, arXiv:2410.10870).",
        "",
        "## Lineage",
        "",
        "| what | name | fingerprint |",
        "|---|---|---|",
        _row("base", record.base),
        _row("patch", record.patch),
        _row("the patch was trained on", trained)
        if trained
        else "| the patch was trained on | not known | not known |",
        "",
        "## Verified when this directory was written",
        "",
        *(f"- {check}" for check in checks),
        "- the SHA-256 of every file is in port.json",
        "",
        "Whether the task's quality carried over was not measured here: evaluate it.",
    ]


def _row(what: str, source: Source) -> str:
    name = f"{source.name} @ {source.revision}" if source.revision else source.name
    return f"| {what} | {name} | {source.fingerprint or 'not known'} |"
