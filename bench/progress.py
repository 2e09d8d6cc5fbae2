"""Progress of a run, on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """Prints a line for each thing that begins, with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def __call__(self, text: str) -> None:
        print(f"[{self.seconds():5.0f} s] {text}", file=sys.stderr, flush=True)
