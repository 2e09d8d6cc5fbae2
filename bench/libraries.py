"""The steps of other libraries that are compared: each function makes one from a problem."""

from __future__ import annotations

from typing import Any

import torch

from .measure import Step
from .steps import CoupledProblem, Problem, UnavailableError, first_line


def pat_lasso(problem: Problem) -> Step:
    group = {
        "params": problem.params,
        "prox_type": "ProxLasso",
        "group_type": "ElemGrouper",
        "reg_lambda": problem.l1 * problem.k,
    }
    return _pat(problem, group)


def pat_group_lasso(problem: CoupledProblem) -> Step:
    """Rows of each convolution and linear layer alone; PAT has no groups across tensors."""
    places = list(zip(problem.params, problem.sets, strict=True))
    rows = {id(p) for p, number in places if number is not None and p.dim() > 1}
    grouped = {
        "params": [p for p, _ in places if id(p) in rows],
        "prox_type": "ProxGroupLasso",
        "group_type": "Dim0Grouper",
        "reg_lambda": problem.group_lasso * problem.k,
    }
    return _pat(problem, grouped, {"params": [p for p, _ in places if id(p) not in rows]})


def _pat(problem: Problem, *groups: dict[str, Any]) -> Step:
    try:
        from torchao.prototype.pat.optim import PruneOptimizer
    except ImportError as error:
        raise UnavailableError(f"torchao with prototype.pat: {first_line(error)}") from None
    base = torch.optim.SGD(
        list(groups),
        lr=problem.lr,
        momentum=problem.momentum,
        weight_decay=problem.weight_decay,
        fused=True,
    )
    step: Step = PruneOptimizer(base).step
    return step


def ftrl(problem: Problem) -> Step:
    try:
        from pytorch_optimizer import FTRL
    except ImportError as error:
        raise UnavailableError(f"pytorch_optimizer: {first_line(error)}") from None
    step: Step = FTRL(
        problem.params,
        lr=problem.lr,
        beta=1.0,
        lambda_1=problem.l1,
        lambda_2=problem.weight_decay,
    ).step
    return step


def proxtorch(problem: Problem) -> Step:
    try:
        from proxtorch.operators import L1
    except ImportError as error:
        raise UnavailableError(f"proxtorch: {first_line(error)}") from None
    sgd = problem.sgd(fused=True)
    operator = L1(alpha=problem.l1 * problem.k)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        for p in problem.params:
            p.copy_(operator.prox(p, problem.lr))

    return step
