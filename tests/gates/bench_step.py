"""The step under pytest-benchmark: ``pytest tests/gates/bench_step.py --benchmark-only``.

The rows of ``python -m bench`` without its interleaving: to watch a single row. Ratios of rows are
better taken from ``python -m bench``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark isn't installed")

from bench import measure, models, plan, tables
from bench.baselines import BASELINES, COMPILED
from bench.steps import UnavailableError

DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    ),
)
# Compiling takes a minute a row: only `python -m bench` has those.
ROWS = [key for key in BASELINES if key not in COMPILED]


@functools.lru_cache(maxsize=1)
def inputs(model: str, layout: models.Layout) -> tables.Inputs:
    return tables.Inputs(models.shapes(model), layout)


def measured(benchmark: Any, key: str, made: tables.Inputs, device: str, rounds: int) -> None:
    """Checks a row and times it."""
    try:
        step, checked = tables.prepare(BASELINES[key], made)
    except UnavailableError as error:
        pytest.skip(str(error))
    wait = measure.synchronise(device) or (lambda: None)

    def work() -> None:
        step()
        wait()

    benchmark.extra_info |= {"method": BASELINES[key].method, "elements": made.elements, **checked}
    benchmark.pedantic(work, rounds=rounds, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", ROWS)
def test_resnet50(benchmark: Any, key: str, device: str) -> None:
    benchmark.group = f"ResNet-50, float32, {device}"
    measured(benchmark, key, inputs("resnet50", models.Layout(device)), device, rounds=7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", plan.FEW)
@pytest.mark.parametrize("layout", ["bfloat16", "channels_last"])
def test_layouts(benchmark: Any, key: str, layout: str, device: str) -> None:
    benchmark.group = f"ResNet-50, {layout}, {device}"
    dtype = torch.bfloat16 if layout == "bfloat16" else torch.float32
    made = inputs("resnet50", models.Layout(device, dtype, layout == "channels_last"))
    measured(benchmark, key, made, device, rounds=7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", ["prox", "pure", "sgd_foreach", "sgd_fused"])
def test_host_time(benchmark: Any, key: str, device: str) -> None:
    """161 tensors of one element."""
    benchmark.group = f"host time, {device}"
    measured(benchmark, key, tables.Inputs([(1,)] * 161, models.Layout(device)), device, rounds=200)
