"""The check of a row before it is timed: its weights against a float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .baselines import STEPS_CHECKED, Baseline
from .measure import Step
from .steps import Problem, learning_rates

# The methods round at different places. Ten steps in float32 stay within a few units in the last
# place of weights of size 1; bfloat16 and float16 storage adds half a unit at every step.
TOLERANCES = {
    torch.float64: (1e-12, 1e-14),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (STEPS_CHECKED * 2**-8, 1e-3),
    torch.float16: (STEPS_CHECKED * 2**-11, 1e-3),
}


def reference(
    value: Tensor, grad: Tensor, problem: Problem, l1: float, rates: Sequence[float], start: bool
) -> Tensor:
    """Values after a step for each of ``rates``, in float64: momentum, then the proximal map.

    ``start``: the penalties are of the distance from ``value``.
    """
    p, g = value.double(), grad.double()
    towards = p if start else torch.zeros_like(p)
    m = torch.zeros_like(p)
    for lr in rates:
        m = problem.momentum * m + g + problem.weight_decay * (p - towards)
        u = p - lr * m - towards
        p = towards + u.sign() * (u.abs() - lr * l1 * problem.k).clamp_min(0)
    return p


@dataclass(frozen=True)
class Check:
    """The result of comparing a row's weights with the reference."""

    steps: int
    same: bool
    deviation: float
    zeros: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return dict(self.__dict__)


class Checker:
    """Compares a row's weights with the reference after its first steps.

    The reference is computed once for each set of coefficients, on evenly spaced elements of every
    tensor, about ``most`` of each: the update is elementwise.
    """

    def __init__(self, values: Sequence[Tensor], grads: Sequence[Tensor], most: int = 4096) -> None:
        self._strides = [max(1, v.numel() // most) for v in values]
        self._values = self._sample(values)
        self._grads = self._sample(grads)
        self._references: dict[tuple[float, ...], Tensor] = {}

    def _sample(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [t.detach().reshape(-1)[::s] for t, s in zip(tensors, self._strides, strict=True)]
        )

    def check(self, baseline: Baseline, problem: Problem, step: Step, done: int) -> Check:
        """Compares after ``baseline.checked_steps`` steps, of which ``done`` have run already."""
        for _ in range(done, baseline.checked_steps):
            step()
        l1 = problem.l1 if baseline.l1 else 0.0
        rates = tuple(
            itertools.islice(learning_rates(problem, baseline.varying), baseline.checked_steps)
        )
        key = (baseline.start, l1, problem.momentum, *rates)
        if key not in self._references:
            self._references[key] = reference(
                self._values, self._grads, problem, l1, rates, baseline.start
            )
        expected = self._references[key]
        sample = self._sample(problem.params)
        relative, absolute = baseline.tolerance or TOLERANCES[sample.dtype]
        actual = sample.double()
        return Check(
            steps=baseline.checked_steps,
            same=bool(torch.allclose(actual, expected, rtol=relative, atol=absolute)),
            deviation=float((actual - expected).abs().max()),
            zeros=float((sample == 0).double().mean()),
        )
