"""What a port would do, for people and as JSON: one line per tensor it writes anew, then what config.json will say."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portllm.checkpoint.planning.changes import Plan
    from portllm.checkpoint.record.records import PortRecord

LISTED = 6  # more tensors of the patch than these behind one line are counted, not named


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as `port --dry-run --json` carries it."""
    return {"changes": [{**row, "from": list(row["from"])} for row in plan.rows()], "config": dict(plan.config)}


def lines(plan: Plan, record: PortRecord) -> Iterator[str]:
    """The plan in lines: tensor, dtype, shape, what happens, out of which tensors of the patch; then the totals."""
    rows = list(plan.rows())
    widths = {key: max((len(_plain(row[key])) for row in rows), default=0) for key in ("tensor", "dtype", "shape")}
    for row in rows:
        start = "  ".join(_plain(row[key]).ljust(width) for key, width in widths.items())
        yield f"{start}  {_plain(row['change'])}" + (f"  from {folded(row['from'])}" if row["from"] else "")
    for key, value in sorted(plan.config.items()):
        yield f"config.json: {_plain(key)} = {_plain(json.dumps(value, ensure_ascii=False))}"
    kinds = Counter(_plain(row["change"]) for row in rows)
    counted = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
    copied = _copies(record)
    yield (
        f"dry run: {len(rows)} tensors would change ({counted or 'none'}), {copied}; "
        f"{record.modules['matched']} of {record.modules['total']} modules; nothing was written"
    )


def _copies(record: PortRecord) -> str:
    """What would be copied, in words: as an adapter the patch itself, whatever a merge would change."""
    if record.output == "adapter":
        return "as an adapter they stay in the patch, which is copied"
    return f"{record.tensors.get('copied', 0)} would be copied"


def folded(names: Sequence[str]) -> str:
    """`a.lora_A.weight`, `a.lora_B.weight` as `a.lora_{A,B}.weight`: the names of a few tensors in short."""
    names = [_plain(name) for name in names]
    if len(names) == 1:
        return names[0]
    if len(names) > LISTED:
        return f"{names[0]} … {names[-1]} ({len(names)} tensors)"
    head = os.path.commonprefix(names)
    rest = [name[len(head) :] for name in names]
    tail = os.path.commonprefix([name[::-1] for name in rest])[::-1]
    return f"{head}{{{','.join(name[: len(name) - len(tail)] for name in rest)}}}{tail}"


def _plain(text: str) -> str:
    # names come out of files: none may move the cursor or break the line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
