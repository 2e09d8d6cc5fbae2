"""The group lasso on a ResNet-50's channels: a step against others that shrink rows.

Row i of the convolutions that write to one place, with element i of their norms, is a group: the 37
sets that ``resnet_reg_ext.channels`` finds in torchvision's model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import resnet_reg_ext

from . import libraries, measure, models, steps, tables
from .checks import TOLERANCES
from .keys import COUPLED, LIMIT, MODELS, OURS
from .measure import MemoryLimit, Step
from .models import Layout
from .progress import Progress
from .steps import GROUP_LASSO, CoupledProblem, UnavailableError

STEPS_CHECKED = 10


# ---- The steps ----------------------------------------------------------------------------------


def native(problem: CoupledProblem) -> Step:
    group = {"params": problem.params, "rows": list(problem.sets)}
    step: Step = resnet_reg_ext.ProxSGD(
        [group],
        lr=problem.lr,
        momentum=problem.momentum,
        weight_decay=problem.weight_decay,
        l1=0.0,
        group_lasso=problem.group_lasso,
        fused=True,
    ).step
    return step


def _scale_rows(members: Sequence[Tensor], threshold: float) -> None:
    squares = sum(p.reshape(len(p), -1).square().sum(1) for p in members)
    assert isinstance(squares, Tensor)
    factor = (1 - threshold / squares.sqrt()).clamp_min(0)  # of a row of zeros: 1 - inf
    for p in members:
        p.mul_(factor.view(-1, *[1] * (p.dim() - 1)))


def loop(problem: CoupledProblem) -> Step:
    sgd = problem.sgd(fused=True)
    members = [(one, problem.row_threshold(one)) for one in problem.members()]

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        for of_set, threshold in members:
            _scale_rows(of_set, threshold)

    return step


def compiled(problem: CoupledProblem) -> Step:
    lr = torch.tensor(problem.lr, device=problem.params[0].device)
    momentum, weight_decay = problem.momentum, problem.weight_decay
    triples = [(p, p.grad, torch.zeros_like(p)) for p in problem.params]
    factor = problem.group_lasso * problem.k
    sets = list(problem.sets)

    def step(lr: Tensor) -> None:
        with torch.no_grad():
            for (p, g, m), number in zip(triples, sets, strict=True):
                assert g is not None
                m.mul_(momentum).add_(g).add_(p, alpha=weight_decay)
                v = p - lr * m
                if p.dim() > 1 and number is not None:
                    rows = v.flatten(1)
                    threshold = lr * factor * math.sqrt(rows.shape[1])
                    norm = rows.square().sum(1, keepdim=True).sqrt()
                    v = (rows * (1 - threshold / norm).clamp_min(0)).view(p.shape)
                p.copy_(v)

    return steps.compile_step(step, lr, whole=True)


@dataclass(frozen=True)
class CoupledRow:
    """A row of the table; ``check``: whether its weights must be the reference's."""

    key: str
    name: str
    method: str
    make: Callable[[Any], Step]
    check: bool = False


ELEMENTWISE = "prox_elementwise"
ROWS = (
    CoupledRow(
        OURS,
        "ProxSGD, native, group lasso on channels",
        "SGD with momentum and weight decay, then each channel of all its tensors scaled by "
        "max(0, 1 - threshold/norm)",
        native,
        check=True,
    ),
    CoupledRow(
        ELEMENTWISE,
        "ProxSGD, native, elementwise",
        "the same optimizer on the same tensors without the group lasso",
        native,
    ),
    CoupledRow(
        "groups_loop",
        "SGD(fused) + the same map as a loop over the sets",
        "squares, sums and products of PyTorch after the step",
        loop,
        check=True,
    ),
    CoupledRow(
        "compile_rows",
        "torch.compile(SGD + rows of each convolution by hand), tensor lr",
        "another objective: a group is a row of one tensor alone, so that nothing spans tensors",
        compiled,
    ),
    CoupledRow(
        "pat_groups",
        "torchao PAT, group lasso, on SGD(fused)",
        "another objective, as the row before, by another method: the map acts on a copy of latent "
        "weights",
        libraries.pat_group_lasso,
    ),
)


# ---- The table ----------------------------------------------------------------------------------


def _inputs(sizes: Sequence[models.Shape], sets: Sequence[int | None]) -> Callable[[], Any]:
    """Makes problems; half of the rows have gradients that their threshold outweighs."""
    layout = Layout()
    values = models.tensors(sizes, layout, tables.VALUE_SCALE, seed=0)
    grads = models.tensors(sizes, layout, GROUP_LASSO, seed=1)
    for tensors in (values, grads):
        for t in tensors:
            scales = torch.linspace(0.01, 2, len(t))
            t.mul_(scales.view(-1, *[1] * (t.dim() - 1)))
    return lambda: CoupledProblem(models.parameters(values, grads), sets=sets)


def reference(problem: CoupledProblem, count: int) -> list[Tensor]:
    """Values after some steps, in float64."""
    params = [p.detach().double() for p in problem.params]
    grads = [p.grad.double() for p in problem.params if p.grad is not None]
    buffers = [torch.zeros_like(p) for p in params]
    for _ in range(count):
        for p, g, m in zip(params, grads, buffers, strict=True):
            m.mul_(problem.momentum).add_(g + problem.weight_decay * p)
            p.sub_(problem.lr * m)
        doubles = replace(problem, params=[Parameter(p) for p in params])
        for of_set in doubles.members():
            _scale_rows([p.detach() for p in of_set], problem.row_threshold(of_set))
    return params


def run(progress: Progress, rounds: int, budget: float, compiles: bool) -> dict[str, Any]:
    """Checks and times the rows, and describes them as :func:`tables.run_table` does."""
    sizes, sets = models.shapes("resnet50"), models.coupled("resnet50")
    problem = _inputs(sizes, sets)
    result: dict[str, Any] = {
        "key": COUPLED,
        "model": f"{MODELS['resnet50']}, group lasso on its channels",
        "device": "cpu",
        "dtype": "float32",
        "format": "contiguous",
        "momentum": problem().momentum,
        "threads": torch.get_num_threads(),
        "tensors": len(sizes),
        "elements": models.numel(sizes),
        "rows": [],
        "ratios": {},
    }
    progress(f"{COUPLED}: {result['model']}")
    expected = reference(problem(), STEPS_CHECKED)
    prepared: dict[str, Step] = {}
    for row in ROWS:
        described: dict[str, Any] = {"key": row.key, "name": row.name, "method": row.method}
        result["rows"].append(described)
        if row.make is compiled and not compiles:
            described["missing"] = "left out in the quick form"
            continue
        progress(f"  {row.name}")
        try:
            prepared[row.key], described["check"] = _prepare(row, problem(), expected)
        except UnavailableError as error:
            described["missing"] = str(error)
    if OURS not in prepared:
        return result
    prepared[ELEMENTWISE] = steps.switched(prepared[OURS], {"group_lasso": 0.0})
    limit = MemoryLimit(result["elements"], "cpu", torch.float32)
    progress(f"  {len(prepared)} rows in turn")
    samples = measure.interleave({**prepared, LIMIT: limit}, rounds, budget=budget)
    tables.add_times(result, samples, limit, Layout(), result["momentum"])
    for row_result in result["rows"]:
        if row_result["key"] in prepared:
            peak = measure.peak_memory(prepared[row_result["key"]], "cpu")
            row_result["extra_mib"] = None if peak is None else peak / 2**20
    return result


def _prepare(
    row: CoupledRow, problem: CoupledProblem, expected: Sequence[Tensor]
) -> tuple[Step, dict[str, Any] | None]:
    """A row's step, checked where its weights are the reference's.

    Raises:
        UnavailableError: its library is missing, or its weights are others.
    """
    step = row.make(problem)
    if not row.check:
        step()
        return step, None
    for _ in range(STEPS_CHECKED):
        step()
    deviation = max(
        float((p.detach().double() - e).abs().max())
        for p, e in zip(problem.params, expected, strict=True)
    )
    for p, e in zip(problem.params, expected, strict=True):
        if not torch.allclose(p.detach().double(), e, *TOLERANCES[p.dtype]):
            raise UnavailableError(
                f"after {STEPS_CHECKED} steps its weights differ from the reference by "
                f"{deviation:.1e}, so it is not timed"
            )
    zeros = sum(int((p == 0).sum()) for p in problem.params) / models.numel(
        [p.shape for p in problem.params]
    )
    return step, {
        "steps": STEPS_CHECKED,
        "same": True,
        "deviation": deviation,
        "zeros": zeros,
    }
