"""Cost against the size of one tensor, and against the number of tensors of the same elements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import measure, models
from .baselines import BASELINES
from .keys import LIMIT, OURS
from .measure import MemoryLimit, Step
from .models import Layout
from .plan import Plan
from .progress import Progress
from .tables import Inputs, prepare

MANY = 10_000_000


def run_sizes(plan: Plan, device: str, progress: Progress) -> dict[str, Any]:
    """Times steps of one tensor, for each size."""
    keys = (OURS, "sgd_fused", "foreach_threshold")
    points = []
    for elements in plan.sizes:
        # Values, gradients, each row's weights and momentum, the memory limit's three, temporaries.
        needed = 4 * elements * (2 + 2 * len(keys) + 3 + 2)
        if needed > 0.6 * _free_memory(device):
            points.append({"elements": elements, "missing": f"needs {needed / 2**30:.1f} GiB"})
            continue
        progress(f"one tensor of {elements:,} elements")
        inputs = Inputs([(elements,)], Layout(device))
        limit = MemoryLimit(elements, device, torch.float32)
        rows: dict[str, Step] = {key: prepare(BASELINES[key], inputs)[0] for key in keys}
        samples = measure.interleave(
            {**rows, LIMIT: limit},
            plan.rounds,
            budget=plan.budget,
            sync=measure.synchronise(device),
        )
        moved = measure.bytes_an_element(torch.float32, momentum=True)
        points.append(
            {
                "elements": elements,
                "us": {key: samples.time(key, 1e-6) for key in keys},
                "limit_us": measure.quantiles(
                    [1e6 * s * moved / limit.bytes_an_element for s in samples.seconds[LIMIT]]
                ),
            }
        )
    return {"threads": torch.get_num_threads(), "points": points}


def run_counts(plan: Plan, device: str, progress: Progress) -> dict[str, Any]:
    """Times steps of ten million elements, for each number of tensors that they are split into."""
    keys = (OURS, "sgd_fused")
    rows: dict[str, Step] = {}
    for count in plan.counts:
        progress(f"{MANY:,} elements in {count:,} tensors")
        inputs = Inputs(models.split(MANY, count), Layout(device))
        rows |= {f"{key}/{count}": prepare(BASELINES[key], inputs)[0] for key in keys}
    samples = measure.interleave(
        rows, plan.rounds, budget=2 * plan.budget, sync=measure.synchronise(device)
    )
    return {
        "threads": torch.get_num_threads(),
        "elements": MANY,
        "points": [
            {
                "tensors": count,
                "us": {key: samples.time(f"{key}/{count}", 1e-6) for key in keys},
                "over_one": {key: samples.ratio(f"{key}/{count}", f"{key}/1") for key in keys},
            }
            for count in plan.counts
        ],
    }


def _free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 * 2**30
