"""The rows of the tables: ProxSGD and its alternatives, with their names and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import libraries, steps
from .keys import OURS
from .measure import Step
from .steps import Problem

STEPS_CHECKED = 10


@dataclass(frozen=True)
class Baseline:
    """A row of a table.

    Addresses of tensors change a time by some percent, so rows that are ProxSGD with another
    option are timed on the first row's tensors.

    Attributes:
        key: the row's name in results.
        name: the row's name in tables.
        method: one sentence on how the step is done.
        make: makes the step from a problem.
        l1: whether the step shrinks the weights.
        start: whether the penalties are of the distance from the first values.
        checked_steps: steps that are compared with the reference before the row is timed; 0 for
            another method.
        varying: whether lr changes at every step.
        changes_grads: whether the step writes to the gradients.
        option: options of the first row's optimizer that change for this row.
        same_parameters: uses the first row's parameters with momentum buffers of its own.
        tolerance: relative and absolute; for a row that rounds more than its weights' dtype does.
    """

    key: str
    name: str
    method: str
    make: Callable[[Problem], Step]
    l1: bool = True
    start: bool = False
    checked_steps: int = STEPS_CHECKED
    varying: bool = False
    changes_grads: bool = False
    option: dict[str, Any] | None = None
    same_parameters: bool = False
    tolerance: tuple[float, float] | None = None


BASELINES = {
    b.key: b
    for b in (
        Baseline(
            OURS,
            "ProxSGD, native",
            "SGD with momentum, weight decay and the exact L1 proximal map in one pass",
            steps.native,
        ),
        Baseline(
            "prox_no_l1",
            "ProxSGD, native, l1=0",
            "the same pass without the L1: torch's SGD bit for bit",
            steps.native_without_l1,
            l1=False,
            option={"l1": 0.0},
        ),
        Baseline(
            "prox_bfloat16_momentum",
            "ProxSGD, native, momentum in bfloat16",
            "momentum_dtype=torch.bfloat16: 16 bytes an element instead of 20",
            steps.native_with_bfloat16_momentum,
            same_parameters=True,
            # A momentum is off by 2^-9 of itself; ten steps move no weight by more than 0.05.
            tolerance=(1e-5, 1e-4),
        ),
        Baseline(
            "prox_track_sparsity",
            "ProxSGD, native, zeros counted",
            "track_sparsity=True: exact zeros of each tensor are counted in the same pass",
            steps.native_counting_zeros,
            option={"track_sparsity": True},
        ),
        Baseline(
            "prox_start",
            "ProxSGD, native, towards the start",
            'toward="start": L1 and weight decay of the distance from the first values, in the '
            "same pass; 24 bytes an element",
            steps.native_towards_start,
            start=True,
            option={"toward": "start"},
        ),
        Baseline(
            "pure",
            "ProxSGD, pure PyTorch",
            "the fallback where the native module isn't built or can't take a tensor",
            steps.pure,
        ),
        Baseline("sgd_loop", "SGD(loop)", "no L1; foreach=False", steps.sgd_loop, l1=False),
        Baseline("sgd_foreach", "SGD(foreach)", "no L1; foreach=True", steps.sgd_foreach, l1=False),
        Baseline("sgd_fused", "SGD(fused)", "no L1; fused=True", steps.sgd_fused, l1=False),
        Baseline(
            "softshrink",
            "SGD(fused) + softshrink loop",
            "p.copy_(softshrink(p)) for each tensor after the step",
            steps.fused_softshrink_loop,
        ),
        Baseline(
            "softshrink_in_place",
            "SGD(fused) + softshrink in place",
            "aten.softshrink.out(p, out=p), which torch.nn doesn't offer, for each tensor",
            steps.fused_softshrink_in_place,
        ),
        Baseline(
            "foreach_threshold",
            "SGD(foreach) + foreach soft-threshold",
            "sign(p)·max(|p| - t, 0) in five torch._foreach operations after the step",
            steps.foreach_threshold,
        ),
        Baseline(
            "foreach_clamp",
            "SGD(foreach) + foreach clamp",
            "p - clamp(p, -t, t) in three torch._foreach operations after the step",
            steps.foreach_clamp,
        ),
        Baseline(
            "l1_loss",
            "L1 as a loss term + SGD(fused)",
            "another method: subgradients of l1·Σ|p|, no exact zeros; the penalty's forward and "
            "backward are counted",
            steps.l1_loss,
            checked_steps=0,
            changes_grads=True,
        ),
        Baseline(
            "start_loss",
            "L2 towards the start as a loss term + SGD(fused)",
            "½·weight_decay·‖w - start‖² through autograd, without L1; the penalty's forward and "
            "backward are counted, and add to the gradients at every step",
            steps.start_loss,
            l1=False,
            start=True,
            checked_steps=1,
            changes_grads=True,
        ),
        Baseline(
            "compile_tensor",
            "torch.compile(SGD + soft-threshold), tensor lr",
            "optimizer.step() and the threshold in one compiled function; lr is a tensor that "
            "changes at every step",
            steps.compiled_tensor_lr,
            varying=True,
        ),
        Baseline(
            "compile_float",
            "torch.compile(SGD + soft-threshold), float lr",
            "optimizer.step() and the threshold in one compiled function; compiled anew whenever "
            "lr changes, which isn't counted",
            steps.compiled_float_lr,
        ),
        Baseline(
            "compile_whole",
            "torch.compile(SGD + soft-threshold by hand), tensor lr",
            "momentum, weight decay and threshold written out so that one graph holds them all; lr "
            "is a tensor that changes at every step",
            steps.compiled_whole,
            varying=True,
        ),
        Baseline(
            "compile_start",
            "torch.compile(SGD + soft-threshold towards the start by hand), tensor lr",
            "the row before with the distance from the first values",
            steps.compiled_start,
            start=True,
            varying=True,
        ),
        Baseline(
            "pat",
            "torchao PAT, lasso, on SGD(fused)",
            "another method from the second step on: the map acts on a copy of latent weights with "
            "a threshold that grows with Σlr; only the first step is the same",
            libraries.pat_lasso,
            checked_steps=1,
        ),
        Baseline(
            "ftrl",
            "pytorch_optimizer FTRL",
            "another method: follow the regularised leader with L1, adaptive, no momentum",
            libraries.ftrl,
            checked_steps=0,
        ),
        Baseline(
            "proxtorch",
            "proxtorch L1 on SGD(fused)",
            "p.copy_(L1.prox(p)) for each tensor after the step",
            libraries.proxtorch,
        ),
    )
}
COMPILED = ("compile_tensor", "compile_float", "compile_whole", "compile_start")
