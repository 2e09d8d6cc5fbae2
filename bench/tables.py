"""Tables: rows that step the same model, each checked, then timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import measure, models, steps
from .baselines import BASELINES, COMPILED, Baseline
from .checks import Checker
from .keys import LIMIT, MODELS, OURS
from .measure import MemoryLimit, Samples, Step
from .models import Layout
from .plan import Table
from .progress import Progress
from .steps import Problem, UnavailableError

# Seconds for compiling; a row that would exceed them, judged by the one before, is left out.
COMPILE_BUDGET = 250.0
VALUE_SCALE, GRAD_SCALE = 0.02, 1e-3


class Inputs:
    """The values and gradients that all rows of a table start from."""

    def __init__(
        self, sizes: Sequence[models.Shape], layout: Layout, momentum: float = 0.9
    ) -> None:
        self.values = models.tensors(sizes, layout, VALUE_SCALE, seed=0)
        self.grads = models.tensors(sizes, layout, GRAD_SCALE, seed=1)
        self.elements = models.numel(sizes)
        self.momentum = momentum
        self.checker = Checker(self.values, self.grads)

    def problem(self, baseline: Baseline) -> Problem:
        """A row's own parameters; gradients are shared unless the row's step writes to them."""
        grads = [g.clone() for g in self.grads] if baseline.changes_grads else self.grads
        return Problem(models.parameters(self.values, grads), momentum=self.momentum)


def prepare(
    baseline: Baseline, inputs: Inputs, shared: Problem | None = None
) -> tuple[Step, dict[str, Any]]:
    """Makes and checks a row's step, and describes the check.

    Args:
        baseline: the row.
        inputs: what it starts from.
        shared: the parameters that the returned step updates; unset: those that were checked.

    Raises:
        UnavailableError: the row's library is missing, or its weights aren't the reference's.
    """
    problem = inputs.problem(baseline)
    step = baseline.make(problem)
    if not baseline.checked_steps:
        step()
        return step, {"check": None}
    # Making a compiled step has run it once.
    done = 1 if baseline.key in COMPILED else 0
    check = inputs.checker.check(baseline, problem, step, done)
    if not check.same:
        raise UnavailableError(
            f"after {check.steps} steps its weights differ from the reference by "
            f"{check.deviation:.1e}, so it is not timed"
        )
    if shared is not None:
        step = baseline.make(shared)
    return step, {"check": check.as_dict()}


def run_table(table: Table, left_out: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Checks and times the rows of a table, and describes them."""
    layout = table.layout
    result: dict[str, Any] = {
        "key": table.key,
        "model": MODELS[table.model],
        "device": layout.device,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "format": "channels_last" if layout.channels_last else "contiguous",
        "momentum": table.momentum,
        "rows": [],
        "ratios": {},
    }
    progress(f"{table.key}: {result['model']}, {result['dtype']}, {result['format']}")
    sizes = models.shapes(table.model)
    with measure.threads(table.threads):
        inputs = Inputs(sizes, layout, table.momentum)
        result |= {
            "threads": torch.get_num_threads(),
            "tensors": len(sizes),
            "elements": inputs.elements,
        }
        prepared = _prepare_rows(result["rows"], table.rows, inputs, left_out, progress)
        limit = MemoryLimit(inputs.elements, layout.device, torch.float32)
        progress(f"  {len(prepared)} rows in turn")
        samples = measure.interleave(
            {**prepared, LIMIT: limit},
            table.rounds,
            budget=table.budget,
            sync=measure.synchronise(layout.device),
        )
        add_times(result, samples, limit, layout, table.momentum)
        for row in result["rows"]:
            if row["key"] in prepared:
                peak = measure.peak_memory(prepared[row["key"]], layout.device)
                row["extra_mib"] = None if peak is None else peak / 2**20
    return result


def _prepare_rows(
    rows: list[dict[str, Any]],
    keys: Sequence[str],
    inputs: Inputs,
    left_out: Sequence[str],
    progress: Progress,
) -> dict[str, Step]:
    """Makes and checks the steps of all rows; describes each row in ``rows``."""
    prepared: dict[str, Step] = {}
    shared = inputs.problem(BASELINES[OURS])
    compiling = last = 0.0
    for key in keys:
        baseline = BASELINES[key]
        row: dict[str, Any] = {"key": key, "name": baseline.name, "method": baseline.method}
        rows.append(row)
        if key in left_out:
            row["missing"] = "left out in the quick form"
            continue
        if key in COMPILED and compiling + last > COMPILE_BUDGET:
            row["missing"] = f"left out: compiling those before took {compiling:.0f} s"
            continue
        progress(f"  {baseline.name}")
        start = progress.seconds()
        try:
            shares = key == OURS or baseline.same_parameters
            prepared[key], checked = prepare(baseline, inputs, shared if shares else None)
            row |= checked
        except UnavailableError as error:
            row["missing"] = str(error)
        if key in COMPILED:
            last = progress.seconds() - start
            compiling += last
            row["compile_s"] = last
    for key in prepared:
        if OURS in prepared and (option := BASELINES[key].option):
            prepared[key] = steps.switched(prepared[OURS], option)
    return prepared


def add_times(
    result: dict[str, Any], samples: Samples, limit: MemoryLimit, layout: Layout, momentum: float
) -> None:
    """Adds times and ratios to a table."""
    moved = measure.bytes_an_element(layout.dtype, momentum != 0)
    result["rounds"] = len(samples.seconds[LIMIT])
    result["limit"] = {
        "operation": limit.name,
        "bytes_an_element": moved,
        "gb_per_s": measure.quantiles(
            [limit.bytes_an_element * result["elements"] / s / 1e9 for s in samples.seconds[LIMIT]]
        ),
        "ms": measure.quantiles(
            [1e3 * s * moved / limit.bytes_an_element for s in samples.seconds[LIMIT]]
        ),
    }
    for row in result["rows"]:
        if row["key"] in samples:
            row["ms"] = samples.time(row["key"])
            row["ours_over"] = samples.ratio(OURS, row["key"])
    ratios = result["ratios"]
    ratios["prox/limit"] = samples.ratio(OURS, LIMIT, limit.bytes_an_element / moved)
    for key, over in (
        ("pure", "foreach_threshold"),
        ("prox_bfloat16_momentum", OURS),
        ("prox_track_sparsity", OURS),
        ("prox_start", OURS),
        ("prox_start", "start_loss"),
        ("prox_start", "compile_start"),
    ):
        if key in samples and over in samples:
            ratios[f"{key}/{over}"] = samples.ratio(key, over)
