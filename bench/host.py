"""Host time: 161 tensors of one element, as many tensors as ResNet-50 has."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import measure
from .baselines import BASELINES
from .keys import OURS
from .measure import Samples, Step
from .models import Layout
from .plan import Plan
from .progress import Progress
from .steps import Problem, UnavailableError, first_line
from .tables import GRAD_SCALE, VALUE_SCALE, Inputs, prepare

TENSORS = 161


def run_host(plan: Plan, device: str, progress: Progress) -> dict[str, Any]:
    """Times steps on one-element tensors; on a GPU the time to queue the work."""
    progress("host time on one-element tensors")
    keys = (OURS, "pure", "sgd_foreach", "sgd_fused", "foreach_threshold")
    inputs = Inputs([(1,)] * TENSORS, Layout(device))
    rows = {key: prepare(BASELINES[key], inputs)[0] for key in keys}
    # The steps are short, so many rounds cost little.
    samples = measure.interleave(rows, 10 * plan.rounds, budget=plan.budget)
    if device == "cuda":
        torch.cuda.synchronize()
    return {"threads": torch.get_num_threads(), "tensors": TENSORS, **_rows(samples, keys)}


def run_dtensors(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Times steps on one-element DTensors, the parameters of FSDP2, in one gloo process."""
    progress("host time on DTensors")
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "tensors": TENSORS}
    try:
        with _mesh() as mesh:
            rows = {key: _dtensor_step(mesh, key) for key in ("sgd_foreach", OURS)}
            samples = measure.interleave(rows, plan.rounds, budget=plan.budget)
    except UnavailableError as error:
        return {**result, "missing": str(error)}
    return {**result, **_rows(samples, (OURS, "sgd_foreach"))}


def _rows(samples: Samples, keys: Sequence[str]) -> dict[str, Any]:
    """Microseconds of each row, and ProxSGD's time over it."""
    return {
        "rounds": len(samples.seconds[OURS]),
        "rows": [
            {
                "key": key,
                "name": BASELINES[key].name,
                "us": samples.time(key, 1e-6),
                "ours_over": samples.ratio(OURS, key),
            }
            for key in keys
        ],
    }


@contextlib.contextmanager
def _mesh() -> Iterator[Any]:
    """A device mesh of this process alone."""
    folder = tempfile.mkdtemp()
    try:
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh

        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UnavailableError(f"torch.distributed with gloo: {first_line(error)}") from None
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)


def _dtensor_step(mesh: Any, key: str) -> Step:
    """A row's step on sharded parameters of one element."""
    from torch.distributed.tensor import Shard, distribute_tensor

    params = []
    for _ in range(TENSORS):
        value, grad = (torch.full((1,), scale) for scale in (VALUE_SCALE, GRAD_SCALE))
        parameter = torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(grad, mesh, [Shard(0)])
        params.append(parameter)
    baseline = BASELINES[key]
    try:
        step = baseline.make(Problem(params))
        step()
    except Exception as error:
        raise UnavailableError(
            f"{baseline.name} takes no DTensors here: {first_line(error)}"
        ) from error
    return step
