"""What an execution found wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

KINDS = (
    "out-of-bounds",
    "misaligned",
    "uninitialised",
    "read-only",
    "race",
    "barrier",
    "absent-lane",
    "trap",
    "budget",
)


@dataclass(frozen=True)
class Finding:
    """One fault: what, where in the source, by which thread, and at which address if any."""

    kind: str
    message: str
    kernel: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    source: str
    instruction: str
    address: int | None = None
    allocation: str | None = None  # the nearest one, and how far away

    def __str__(self) -> str:
        where = "" if self.address is None else f", address {self.address:#x} ({self.allocation})"
        return (
            f"{self.kind}: {self.message}{where}; block {self.block}, thread {self.thread} of "
            f"{self.kernel}, {self.source}: {self.instruction}"
        )


class Findings:
    """Collects findings: all are counted, the first few of each kind are kept."""

    def __init__(self, keep: int = 20):
        self.keep = keep
        self.kept: list[Finding] = []
        self.counts: Counter[str] = Counter()

    def room(self, kind: str) -> int:
        """How many more of a kind will be kept."""
        return max(self.keep - self.counts[kind], 0)

    def report(self, kind: str, total: int, findings: list[Finding]) -> None:
        """Counts `total` findings of a kind, of which `findings` are worth keeping."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind of finding: {kind}")
        self.kept.extend(findings[: self.room(kind)])
        self.counts[kind] += total
