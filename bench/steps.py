"""The steps that are compared: each function makes one from a problem.

The L1 steps shrink by lr·l1·k, k = (1 - dampening)/(1 - momentum), as ProxSGD does, so that the
same method gives the same weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import resnet_reg_ext

from .measure import Step


class UnavailableError(Exception):
    """A row can't be timed, because its library is missing or its weights are wrong."""


@dataclass(frozen=True)
class Problem:
    """Parameters with gradients, and the coefficients of a step."""

    params: list[Parameter]
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    l1: float = 1e-3

    @property
    def k(self) -> float:
        """The factor of every threshold, 1/(1 - momentum)."""
        return 1 / (1 - self.momentum)

    @property
    def threshold(self) -> float:
        """The threshold of a step with the learning rate ``lr``."""
        return self.lr * (self.l1 * self.k)

    def sgd(self, lr: float | Tensor | None = None, **options: bool) -> torch.optim.SGD:
        """torch's SGD with this problem's coefficients."""
        return torch.optim.SGD(
            self.params,
            lr=self.lr if lr is None else lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            **options,
        )

    def prox_sgd(self, l1: float, fused: bool, **options: Any) -> Step:
        """A ProxSGD step."""
        step: Step = resnet_reg_ext.ProxSGD(
            self.params,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            l1=l1,
            fused=fused,
            **options,
        ).step
        return step


GROUP_LASSO = 1e-3


@dataclass(frozen=True)
class CoupledProblem(Problem):
    """Parameters of which rows are coupled; ``sets`` has each one's number, or None."""

    sets: Sequence[int | None] = ()
    group_lasso: float = GROUP_LASSO
    l1: float = 0.0

    def members(self) -> list[list[Parameter]]:
        """The parameters of each set."""
        members: dict[int, list[Parameter]] = {}
        for number, p in zip(self.sets, self.params, strict=True):
            if number is not None:
                members.setdefault(number, []).append(p)
        return list(members.values())

    def weight(self, members: Sequence[Tensor]) -> float:
        """a_g: the root of a group's elements."""
        return math.sqrt(sum(p.numel() // len(p) for p in members))

    def row_threshold(self, members: Sequence[Tensor]) -> float:
        """The threshold of a set's norms in one step."""
        return self.lr * (self.group_lasso * self.k) * self.weight(members)


def learning_rates(problem: Problem, varying: bool) -> Iterator[float]:
    """The learning rate of each step: constant, or a different one at each of 200 steps."""
    for i in itertools.count():
        yield problem.lr * (1 - 0.004 * (i % 200)) if varying else problem.lr


# ---- ProxSGD -----------------------------------------------------------------------------------


def native(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=True)


def native_without_l1(problem: Problem) -> Step:
    return problem.prox_sgd(0.0, fused=True)


def native_with_bfloat16_momentum(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=True, momentum_dtype=torch.bfloat16)


def native_counting_zeros(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=True, track_sparsity=True)


def native_towards_start(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=True, toward="start")


def switched(step: Step, options: dict[str, Any]) -> Step:
    """The step of the same optimizer on the same tensors, with other options during the step."""
    optimizer: torch.optim.Optimizer = step.__self__  # type: ignore[attr-defined]
    (group,) = optimizer.param_groups
    before = {key: group[key] for key in options}

    def run() -> None:
        group.update(options)
        step()
        group.update(before)

    return run


def pure(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=False)


# ---- torch.optim.SGD without L1 -----------------------------------------------------------------


def sgd_loop(problem: Problem) -> Step:
    return problem.sgd(foreach=False, fused=False).step


def sgd_foreach(problem: Problem) -> Step:
    return problem.sgd(foreach=True).step


def sgd_fused(problem: Problem) -> Step:
    return problem.sgd(fused=True).step


# ---- SGD, then a soft-threshold -----------------------------------------------------------------


def fused_softshrink_loop(problem: Problem) -> Step:
    sgd = problem.sgd(fused=True)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        for p in problem.params:
            p.copy_(torch.nn.functional.softshrink(p, problem.threshold))

    return step


def fused_softshrink_in_place(problem: Problem) -> Step:
    sgd = problem.sgd(fused=True)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        for p in problem.params:
            torch.ops.aten.softshrink.out(p, problem.threshold, out=p)

    return step


def foreach_soft_threshold_(params: list[Tensor], threshold: float) -> None:
    """sign(p)·max(|p| - threshold, 0) in five torch._foreach operations, in place."""
    sign = torch._foreach_sign(params)
    torch._foreach_abs_(params)
    torch._foreach_sub_(params, threshold)
    torch._foreach_clamp_min_(params, 0)
    torch._foreach_mul_(params, sign)


def foreach_threshold(problem: Problem) -> Step:
    sgd = problem.sgd(foreach=True)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        foreach_soft_threshold_([*problem.params], problem.threshold)

    return step


def foreach_clamp(problem: Problem) -> Step:
    sgd = problem.sgd(foreach=True)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        params: list[Tensor] = [*problem.params]
        within = [*torch._foreach_clamp_min(params, -problem.threshold)]
        torch._foreach_clamp_max_(within, problem.threshold)
        torch._foreach_sub_(params, within)

    return step


def l1_loss(problem: Problem) -> Step:
    sgd = problem.sgd(fused=True)

    def step() -> None:
        penalty = torch.stack([p.abs().sum() for p in problem.params]).sum()
        (problem.l1 * penalty).backward()  # type: ignore[no-untyped-call]
        sgd.step()

    return step


def start_loss(problem: Problem) -> Step:
    """The usual code of L2-SP: the penalty is a term of the loss."""
    sgd = torch.optim.SGD(problem.params, lr=problem.lr, momentum=problem.momentum, fused=True)
    starts = [p.detach().clone() for p in problem.params]

    def step() -> None:
        squares = [
            (p - start).square().sum() for p, start in zip(problem.params, starts, strict=True)
        ]
        penalty = 0.5 * problem.weight_decay * torch.stack(squares).sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        sgd.step()

    return step


def compile_step(step: Callable[..., None], *arguments: Tensor, whole: bool = False) -> Step:
    """Compiles a step and runs it once; ``whole`` refuses a graph break."""
    compiled = torch.compile(step, fullgraph=whole)

    def run() -> None:
        compiled(*arguments)

    try:
        run()
    except Exception as error:
        raise UnavailableError(f"torch.compile fails here: {first_line(error)}") from error
    return run


def _compiled_sgd(problem: Problem, lr: float | Tensor) -> Step:
    """torch's SGD and a soft-threshold: two graphs, as torch.compile can't trace fused=True."""
    sgd = problem.sgd(lr, foreach=True)
    params = problem.params
    factor = problem.l1 * problem.k

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        threshold = sgd.param_groups[0]["lr"] * factor
        for p in params:
            p.copy_(p.sign() * (p.abs() - threshold).clamp_min(0))

    return compile_step(step)


def compiled_float_lr(problem: Problem) -> Step:
    return _compiled_sgd(problem, problem.lr)


def compiled_tensor_lr(problem: Problem) -> Step:
    lr = torch.tensor(problem.lr, device=problem.params[0].device)
    return _with_changing_lr(problem, lr, _compiled_sgd(problem, lr))


def compiled_whole(problem: Problem) -> Step:
    lr = torch.tensor(problem.lr, device=problem.params[0].device)
    momentum, weight_decay = problem.momentum, problem.weight_decay
    factor = problem.l1 * problem.k
    triples = [(p, p.grad, torch.zeros_like(p)) for p in problem.params]

    def step(lr: Tensor) -> None:
        with torch.no_grad():
            threshold = lr * factor
            for p, g, m in triples:
                assert g is not None
                m.mul_(momentum).add_(g).add_(p, alpha=weight_decay)
                v = p - lr * m
                p.copy_(v.sign() * (v.abs() - threshold).clamp_min(0))

    return _with_changing_lr(problem, lr, compile_step(step, lr, whole=True))


def compiled_start(problem: Problem) -> Step:
    lr = torch.tensor(problem.lr, device=problem.params[0].device)
    momentum, weight_decay = problem.momentum, problem.weight_decay
    factor = problem.l1 * problem.k
    rows = [(p, p.grad, torch.zeros_like(p), p.detach().clone()) for p in problem.params]

    def step(lr: Tensor) -> None:
        with torch.no_grad():
            threshold = lr * factor
            for p, g, m, start in rows:
                assert g is not None
                m.mul_(momentum).add_(g).add_(p - start, alpha=weight_decay)
                u = p - lr * m - start
                p.copy_(start + u.sign() * (u.abs() - threshold).clamp_min(0))

    return _with_changing_lr(problem, lr, compile_step(step, lr, whole=True))


def _with_changing_lr(problem: Problem, lr: Tensor, step: Step) -> Step:
    """Changes lr before every step but the first, which compiling has run."""
    rates = learning_rates(problem, varying=True)
    next(rates)

    def changing() -> None:
        lr.fill_(next(rates))
        step()

    return changing


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
