"""The targets: medians that were aimed at before anything was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .keys import COUPLED, LIMIT, MAIN, OURS

Results = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A median that must not be exceeded, and the place of its quantiles in a run's results."""

    what: str
    target: float
    find: Callable[[Results], Any]
    unit: str = "ratio"


def _main(results: Results) -> Any:
    return next(table for table in results["tables"] if table["key"] == MAIN)


def _coupled(key: str) -> Callable[[Results], Any]:
    """The time with the group lasso on channels over a row's in its table."""

    def find(results: Results) -> Any:
        table = next(table for table in results["tables"] if table["key"] == COUPLED)
        return (
            table["ratios"]["prox/limit"] if key == LIMIT else _row(table["rows"], key)["ours_over"]
        )

    return find


def _row(rows: Any, key: str) -> Any:
    return next(row for row in rows if row["key"] == key)


def _ours_over(key: str) -> Callable[[Results], Any]:
    """ProxSGD's time over a row's in the main table."""
    return lambda results: _row(_main(results)["rows"], key)["ours_over"]


def _ratio(name: str) -> Callable[[Results], Any]:
    return lambda results: _main(results)["ratios"][name]


def _host(part: str, key: str) -> Callable[[Results], Any]:
    """ProxSGD's host time over a row's."""
    return lambda results: _row(results[part]["rows"], key)["ours_over"]


def _most_tensors(results: Results) -> Any:
    return results["counts"]["points"][-1]["over_one"][OURS]


def _memory(results: Results) -> Any:
    peak = _row(_main(results)["rows"], OURS)["extra_mib"]
    return {"q20": peak, "q50": peak, "q80": peak}


TARGETS = (
    Target("ProxSGD with L1 over SGD(fused) without L1", 0.90, _ours_over("sgd_fused")),
    Target(
        "ProxSGD with L1 over torch.compile(SGD + soft-threshold), tensor lr",
        0.60,
        _ours_over("compile_tensor"),
    ),
    Target("ProxSGD with L1 over SGD(fused) + softshrink loop", 0.45, _ours_over("softshrink")),
    Target("ProxSGD with L1 over torchao PAT, lasso", 0.12, _ours_over("pat")),
    Target(
        "ProxSGD with L1 over addcmul_ moving as many bytes (20 an element)",
        1.10,
        _ratio("prox/limit"),
    ),
    Target(
        "pure-PyTorch fallback over SGD(foreach) + foreach soft-threshold",
        0.60,
        _ratio("pure/foreach_threshold"),
    ),
    Target("10,000 tensors over one tensor, 10 M elements both", 2.5, _most_tensors),
    Target(
        "host time on 161 one-element tensors over SGD(fused)'s", 0.80, _host("host", "sgd_fused")
    ),
    Target(
        "host time on 161 one-element DTensors, one process, over SGD(foreach)'s",
        0.5,
        _host("dtensors", "sgd_foreach"),
    ),
    Target("the L1 itself: l1 > 0 over l1 = 0", 1.03, _ours_over("prox_no_l1")),
    Target(
        "momentum in bfloat16 over momentum in float32",
        0.85,
        _ratio("prox_bfloat16_momentum/prox"),
    ),
    Target("zeros counted over not counted", 1.03, _ratio("prox_track_sparsity/prox")),
    Target("towards the start over towards zero", 1.30, _ratio("prox_start/prox")),
    Target(
        "towards the start over SGD(fused) + loss term through autograd",
        0.35,
        _ratio("prox_start/start_loss"),
    ),
    Target("group lasso on channels over elementwise", 1.12, _coupled("prox_elementwise")),
    Target("group lasso on channels over addcmul_ moving as many bytes", 1.10, _coupled(LIMIT)),
    Target(
        "group lasso on channels over SGD(fused) + the same map as a loop",
        0.50,
        _coupled("groups_loop"),
    ),
    Target(
        "group lasso on channels over torch.compile(SGD + rows of each convolution)",
        0.70,
        _coupled("compile_rows"),
    ),
    Target("group lasso on channels over torchao PAT, group lasso", 0.26, _coupled("pat_groups")),
    Target("peak extra memory of a step", 1.0, _memory, unit="MiB"),
)


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Each target with its measured quantiles, and whether the median meets it.

    A target that the run did not measure is marked as missing.
    """
    evaluated = []
    for target in TARGETS:
        entry: dict[str, Any] = {
            "what": target.what,
            "target": target.target,
            "unit": target.unit,
        }
        try:
            measured = target.find(results)
            entry |= {key: measured[key] for key in ("q20", "q50", "q80")}
            entry["met"] = measured["q50"] <= target.target
        except (KeyError, TypeError, StopIteration):
            entry["missing"] = True
        evaluated.append(entry)
    return evaluated
