"""How the arms are called and marked, the same in every table and picture."""

from __future__ import annotations

DAGGER = "†"
ARM_NAMES = {"base": "base", "tuned": "tuned", "ported": "ported", "retuned": "retuned", "old": "old tuned"}
