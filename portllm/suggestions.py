"""The nearest known name, for the end of an error message: of a key, a task, a directory."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

CUTOFF = 0.6
SHOWN = 5  # names listed of a directory


def nearest(name: str, known: Iterable[str], *, cutoff: float = CUTOFF) -> str | None:
    """Return the known name that is most like `name`; None where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def nearest_path(path: Path) -> Path | None:
    """Return the existing path that `path` most likely means, each of its parts corrected; None where there is none."""
    place = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        try:
            name = part if (place / part).exists() else nearest(part, (child.name for child in place.iterdir()))
        except OSError:
            return None
        if name is None:
            return None
        place = place / name
    return None if place == path else place


def did_you_mean_path(path: Path) -> str:
    """Return what follows "no such directory": the nearest one, else what its parent directory contains, else nothing.

    The working directory's contents are not listed.
    """
    near = nearest_path(path)
    if near is not None:
        return f"; did you mean {near}?"
    try:
        names = [] if path.parent == Path() else sorted(child.name for child in path.parent.iterdir())
    except OSError:
        return ""
    shown = ", ".join([*names[:SHOWN], *(["…"] if len(names) > SHOWN else [])])
    return f"; {path.parent} contains {shown}" if names else ""
