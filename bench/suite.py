"""A whole run: all measurements of a plan, written as JSON, page and plots."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import coupled, host, machine, report, scaling, tables, targets, training
from .keys import COUPLED
from .plan import Plan, Table
from .progress import Progress


def run(
    plan: Plan, device: str, quick: bool, progress: Progress, only: str | None = None
) -> dict[str, Any]:
    """Measures everything, or ``only`` the main or the coupled table; the result is JSON."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {
        "quick": quick,
        "device": device,
        **when_and_where(device),
        "simd": machine.native_core().simd_level(),
    }

    def run_tables(chosen: Sequence[Table]) -> list[dict[str, Any]]:
        return [
            tables.run_table(
                replace(t, layout=replace(t.layout, device=device)), plan.left_out, progress
            )
            for t in chosen
            if device == "cpu" or t.threads is None
        ]

    def run_coupled() -> list[dict[str, Any]]:
        return [coupled.run(progress, *plan.coupled, compiles=not quick)]

    if only == COUPLED:
        results["tables"] = run_coupled()
    elif only:
        results["tables"] = run_tables(plan.tables[:1])
    else:
        # Host time first: a fragmented heap would change it.
        results["host"] = host.run_host(plan, device, progress)
        results["tables"] = run_tables(plan.tables) + (run_coupled() if device == "cpu" else [])
        results["sizes"] = scaling.run_sizes(plan, device, progress)
        results["counts"] = scaling.run_counts(plan, device, progress)
        results["dtensors"] = host.run_dtensors(plan, progress)
        results["training"] = training.run_training(plan, device, progress)
        results["cold_start"] = training.run_cold_start(plan, progress)
    results["targets"] = targets.evaluate(results)
    progress("done")
    results["seconds"] = round(progress.seconds())
    return rounded(results)


def when_and_where(device: str) -> dict[str, Any]:
    """The date and the machine of a run."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"date": now.strftime("%Y-%m-%d %H:%M UTC"), "machine": machine.machine(device)}


def save(results: dict[str, Any], folder: Path) -> None:
    """Writes JSON, page and plots."""
    path = folder / f"{results['device']}.json"
    write_json(results, path)
    for written in (path, *report.write(path)):
        print(f"written: {written}", file=sys.stderr)


def write_json(results: dict[str, Any], path: Path) -> None:
    """Writes results, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def rounded(results: dict[str, Any]) -> dict[str, Any]:
    """Results with all numbers rounded to five digits, for a file that people read."""

    def of(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: of(v) for key, v in value.items()}
        if isinstance(value, list):
            return [of(v) for v in value]
        return value

    return {key: of(value) for key, value in results.items()}
