"""The compiled library of _sums.c, present where the package was installed with a C compiler; sums.py uses it or numpy.

PORTLLM_KERNEL limits the instructions: `numpy` disables the library; `plain`, `avx2` and `avx512` name instructions.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import ParamsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

VARIABLE = "PORTLLM_KERNEL"
LEVELS = ("plain", "avx2", "avx512")  # the index is the number in _sums.c
VERSION, PANEL, CHUNK = 1, 32, 8  # as in _sums.c
ROOM = 4096  # elements that one call can return as undecided
LONGEST = 4096  # largest rank: above it, the bound of float32's error is too large to decide a rounding

_KINDS = {"uint16": 0, "float16": 1, "float32": 2}  # bfloat16 is stored as uint16


class _Sums(ctypes.Structure):
    """`struct sums` of _sums.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("old", "out")),
        *((name, ctypes.c_int64) for name in ("old_stride", "out_stride", "rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("panels", "norms", "b", "reach", "wide_b", "wide_reach", "doubtful")),
        *((name, ctypes.c_int64) for name in ("room", "found")),
        ("largest", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Panels:
    """A in float32 in the library's layout, PANEL columns together, and an upper bound of each column's norm."""

    values: Array  # (panels, r, PANEL)
    norms: Array  # (panels * PANEL,)


def level() -> int | None:
    """Return the number of the instructions in use, or None where numpy computes. Raises ParamsError."""
    limit = os.environ.get(VARIABLE, "")
    if limit not in ("", "numpy", *LEVELS):
        raise ParamsError(f"{VARIABLE} is {limit!r}, expected numpy, {', '.join(LEVELS)} or nothing")
    library = _library()
    if library is None or limit == "numpy":
        return None
    best: int = library.portllm_sums_level()
    return min(best, LEVELS.index(limit)) if limit else best


def name() -> str:
    """Return what computes the sums here: `numpy`, or `compiled` and the instructions. Raises ParamsError."""
    number = level()
    return "numpy" if number is None else f"compiled {LEVELS[number]}"


def panels(a: Array, norms: Array) -> Panels | None:
    """Return A (r, in) in the library's layout; None where float32 is not exact for it, or r exceeds LONGEST."""
    import numpy

    with numpy.errstate(all="ignore"):
        narrow = a.astype(numpy.float32)
        if not 0 < len(a) <= LONGEST or not (narrow == a).all():
            return None
        width = -(-a.shape[1] // PANEL) * PANEL
        padded = numpy.zeros((len(a), width), numpy.float32)
        padded[:, : a.shape[1]] = narrow
        bounds = numpy.zeros(width, numpy.float32)
        bounds[: a.shape[1]] = numpy.nextafter(norms.astype(numpy.float32), numpy.float32(numpy.inf))
    values = padded.reshape(len(a), -1, PANEL).transpose(1, 0, 2)
    return Panels(numpy.ascontiguousarray(values), bounds)


def suits(old: Array, out: Array) -> bool:
    """Return whether the library accepts weights of this layout: rows without gaps, aligned to their dtype."""
    return (
        old.dtype.name in _KINDS
        and all(
            array.dtype.isnative
            and array.flags.aligned
            and array.shape == old.shape
            and array.strides[1] == array.itemsize
            and array.strides[0] >= array.shape[1] * array.itemsize
            for array in (old, out)
        )
        and old.dtype == out.dtype
        and out.flags.writeable
    )


def add(old: Array, out: Array, a: Panels, b: Array, norms: Array, wide_reach: Array) -> tuple[int, Array] | None:
    """Write old (rows, columns) + b (rows, r) @ a to `out`, where the library can decide; the two may not overlap.

    `norms` (rows,) are upper bounds of the norms of b's rows. `wide_reach` (rows,) is the bound of float64's error
    divided by a column's norm. Both are float64. Returns the bits of the largest absolute value and the flat indices
    of the undecided elements; None where there are more than ROOM of them.
    """
    import numpy

    rows, columns = old.shape
    with numpy.errstate(all="ignore"):
        reach = _reach(b, norms)
        narrow = b.astype(numpy.float32)
    doubtful = numpy.empty(ROOM, numpy.int64)
    job = _Sums(
        old.ctypes.data, out.ctypes.data, old.strides[0], out.strides[0], rows, columns, b.shape[1],
        a.values.ctypes.data, a.norms.ctypes.data, narrow.ctypes.data, reach.ctypes.data, b.ctypes.data,
        wide_reach.ctypes.data, doubtful.ctypes.data, ROOM,
    )  # fmt: skip
    _library().portllm_sums_add(ctypes.byref(job), _KINDS[old.dtype.name], level())
    if job.found > ROOM:
        return None
    return job.largest, doubtful[: job.found]


def _reach(b: Array, norms: Array) -> Array:
    """Return twice the bound of float32's error over a column's norm, (rows,) in float32; inf where none holds."""
    import numpy

    size = numpy.abs(b)
    normal = ((size == 0) | ((size >= 2.0**-126) & (size < 2.0**127))).all(axis=1)
    # the rounding of b, of a product, of the additions within a chunk and between chunks; 2.05 for 2 leaves a margin
    count = b.shape[1]
    roundings = 2 + min(count, CHUNK) + -(-count // CHUNK)
    reach = numpy.nextafter((norms * (2.05 * roundings * 2.0**-24)).astype(numpy.float32), numpy.float32(numpy.inf))
    return numpy.where(norms > 0, numpy.where(normal, reach, numpy.float32(numpy.inf)), numpy.float32(0))


@cache
def _library() -> Any:
    """Return the library next to this file; None where it is absent or of another version."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_sums" + suffix)
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
                if library.portllm_sums_version() == VERSION:
                    library.portllm_sums_add.argtypes = (ctypes.POINTER(_Sums), ctypes.c_int, ctypes.c_int)
                    library.portllm_sums_add.restype = None
                    return library
            except (OSError, AttributeError):
                continue  # built for another machine or an older version: numpy computes
    return None
