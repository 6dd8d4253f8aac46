"""Progress of a port in bytes, over all files and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class Cancelled(Exception):
    """Another file failed; this one stopped early."""


class ByteMeter:
    """Bytes processed so far, over all files; calls `on_progress(done, total)` one call at a time."""

    def __init__(self, total: int, on_progress: Progress | None = None) -> None:
        self.total, self.done = total, 0
        self.cancelled = threading.Event()
        self._on_progress, self._lock = on_progress, threading.Lock()

    def add(self, count: int) -> None:
        """Count `count` more bytes. Raises Cancelled when another file has failed."""
        if self.cancelled.is_set():
            raise Cancelled
        with self._lock:
            self.done += count
            if self._on_progress is not None:
                self._on_progress(self.done, self.total)
