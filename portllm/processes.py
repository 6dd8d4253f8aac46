"""Which of several processes on one job this is, as `accelerate launch` and torchrun tell it.

The first, the main process, alone writes, prints and tracks; the others compute along with it.
"""

from __future__ import annotations

import os

# set by the launcher alone: a RANK left over in somebody's environment must not keep a verb from writing
LAUNCHED = "TORCHELASTIC_RUN_ID"


def index() -> int:
    """The number of this process, 0 for the main one and wherever nothing was launched."""
    return int(os.environ.get("RANK", "0")) if LAUNCHED in os.environ else 0


def count() -> int:
    """How many processes work together, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1")) if LAUNCHED in os.environ else 1


def is_main() -> bool:
    """Whether this process writes, prints and tracks."""
    return index() == 0
