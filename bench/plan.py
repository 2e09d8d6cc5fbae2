"""The plans of a full and a quick run: tables, sizes, rounds and time budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .baselines import BASELINES, COMPILED
from .keys import FLAT, MAIN, OURS
from .models import Layout

ALL = tuple(BASELINES)
EAGER = tuple(key for key in ALL if key not in COMPILED)
FAST = (OURS, "prox_no_l1", "pure", "sgd_foreach", "sgd_fused", "softshrink", "foreach_threshold")
FEW = (OURS, "prox_no_l1", "sgd_fused", "softshrink")


@dataclass(frozen=True)
class Table:
    """A table of rows that step the same model in turn.

    ``rounds`` is the largest number of rounds, ``budget`` the seconds after which no round starts.
    """

    key: str
    model: str = "resnet50"
    rows: tuple[str, ...] = ALL
    layout: Layout = field(default_factory=Layout)
    threads: int | None = None
    momentum: float = 0.9
    rounds: int = 31
    budget: float = 12.0


@dataclass(frozen=True)
class Plan:
    """The parts of a run.

    Attributes:
        tables: the tables; the first is the README's.
        left_out: rows that no table has.
        sizes: numbers of elements of one tensor.
        counts: numbers of tensors that share the same elements.
        rounds: the largest number of rounds of a measurement outside the tables.
        budget: seconds after which such a measurement starts no further round.
        images: (pixels, batch, rounds) of whole training steps.
        cold_starts: new processes that import the package.
        coupled: (rounds, budget) of the table of coupled rows.
    """

    tables: tuple[Table, ...]
    left_out: tuple[str, ...]
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    rounds: int
    budget: float
    images: tuple[tuple[int, int, int], ...]
    cold_starts: int
    coupled: tuple[int, float] = (31, 40.0)

    def with_model(self, model: str) -> Plan:
        """The same plan with another model in the first table."""
        first, *others = self.tables
        return replace(self, tables=(replace(first, model=model), *others))

    def with_rounds(self, rounds: int) -> Plan:
        """The same plan with another largest number of rounds throughout."""
        tables = tuple(replace(table, rounds=rounds) for table in self.tables)
        return replace(self, tables=tables, rounds=rounds, coupled=(rounds, self.coupled[1]))


MAIN_TABLE = Table(MAIN, rounds=61, budget=80.0)
FULL = Plan(
    tables=(
        MAIN_TABLE,
        Table("one_thread", rows=FAST, threads=1),
        Table("bfloat16", rows=FAST, layout=Layout(dtype=torch.bfloat16)),
        Table("channels_last", rows=FEW, layout=Layout(channels_last=True)),
        Table("no_momentum", rows=FEW, momentum=0.0),
        Table("resnet18", "resnet18", rows=EAGER),
        Table("vit_b_16", "vit_b_16", rows=EAGER, rounds=7, budget=25.0),
        Table("flat", FLAT, rows=EAGER),
    ),
    left_out=(),
    sizes=(1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000),
    counts=(1, 10, 100, 1_000, 10_000),
    rounds=41,
    budget=15.0,
    images=((32, 32, 11), (224, 8, 5)),
    cold_starts=7,
)
QUICK = Plan(
    tables=(replace(MAIN_TABLE, rounds=9, budget=40.0),),
    left_out=COMPILED,
    sizes=(1_000, 100_000, 10_000_000),
    counts=(1, 100, 10_000),
    rounds=15,
    budget=6.0,
    images=(),
    cold_starts=0,
    coupled=(9, 15.0),
)
