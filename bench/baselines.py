"""What a step is compared with. Every row is a function that makes a step from a problem.

The L1 rows shrink by lr·l1·k, k = (1 - dampening)/(1 - momentum), as ProxSGD does, so that the
same method gives the same weights; the Checker finds out whether it does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import load_package
from .measure import Step
from .models import Missing

prox = load_package()
STEPS_CHECKED = 10


@dataclass(frozen=True)
class Problem:
    """Parameters with gradients, and the coefficients of a step."""

    params: list[Parameter]
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    l1: float = 1e-3

    @property
    def gain(self) -> float:
        """k."""
        return 1 / (1 - self.momentum)

    @property
    def threshold(self) -> float:
        """How much a step with the learning rate ``lr`` shrinks by."""
        return self.lr * (self.l1 * self.gain)

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
        """A step of ours."""
        step: Step = prox.ProxSGD(
            self.params,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            l1=l1,
            fused=fused,
            **options,
        ).step
        return step


@dataclass(frozen=True)
class Baseline:
    """A row of a table.

    ``checked_steps`` is how many steps are compared with the reference before the row is timed: 0
    where the method is another one. ``option`` is of a row that is ours with another option: it is
    timed on the very tensors of the first row, as where tensors lie in memory makes a difference of
    some percent; ``same_parameters``: on its parameters, with a momentum of its own. ``tolerance``
    (relative, absolute) is for a row that rounds more than its weights' dtype tells.
    """

    key: str
    name: str
    method: str
    make: Callable[[Problem], Step]
    l1: bool = True
    checked_steps: int = STEPS_CHECKED
    varying: bool = False
    changes_grads: bool = False
    option: dict[str, Any] | None = None
    same_parameters: bool = False
    tolerance: tuple[float, float] | None = None


def learning_rates(problem: Problem, varying: bool) -> Iterator[float]:
    """The learning rate of each step: constant, or a cosine-like one that is never the same."""
    for i in itertools.count():
        yield problem.lr * (1 - 0.004 * (i % 200)) if varying else problem.lr


# ---- ours ---------------------------------------------------------------------------------------


def _native(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=True)


def _native_without_l1(problem: Problem) -> Step:
    return problem.prox_sgd(0.0, fused=True)


def _native_with_bfloat16_momentum(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=True, momentum_dtype=torch.bfloat16)


def _native_counting_zeros(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=True, track_sparsity=True)


def switched(step: Step, options: dict[str, Any]) -> Step:
    """The step of the same optimizer, on the same tensors, with other options for its time."""
    optimizer: torch.optim.Optimizer = step.__self__  # type: ignore[attr-defined]
    (group,) = optimizer.param_groups
    before = {key: group[key] for key in options}

    def run() -> None:
        group.update(options)
        step()
        group.update(before)

    return run


def _pure(problem: Problem) -> Step:
    return problem.prox_sgd(problem.l1, fused=False)


# ---- torch.optim.SGD without L1 -----------------------------------------------------------------


def _sgd_loop(problem: Problem) -> Step:
    return problem.sgd(foreach=False, fused=False).step


def _sgd_foreach(problem: Problem) -> Step:
    return problem.sgd(foreach=True).step


def _sgd_fused(problem: Problem) -> Step:
    return problem.sgd(fused=True).step


# ---- SGD, then a soft-threshold -----------------------------------------------------------------


def _fused_softshrink_loop(problem: Problem) -> Step:
    sgd = problem.sgd(fused=True)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        for p in problem.params:
            p.copy_(torch.nn.functional.softshrink(p, problem.threshold))

    return step


def _fused_softshrink_in_place(problem: Problem) -> Step:
    sgd = problem.sgd(fused=True)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        for p in problem.params:
            torch.ops.aten.softshrink.out(p, problem.threshold, out=p)

    return step


def foreach_soft_threshold_(params: list[Tensor], threshold: float) -> None:
    """sign(p)·max(|p| - threshold, 0), as one writes it with torch._foreach."""
    sign = torch._foreach_sign(params)
    torch._foreach_abs_(params)
    torch._foreach_sub_(params, threshold)
    torch._foreach_clamp_min_(params, 0)
    torch._foreach_mul_(params, sign)


def _foreach_threshold(problem: Problem) -> Step:
    sgd = problem.sgd(foreach=True)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        foreach_soft_threshold_([*problem.params], problem.threshold)

    return step


def _foreach_clamp(problem: Problem) -> Step:
    sgd = problem.sgd(foreach=True)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        params: list[Tensor] = [*problem.params]
        within = [*torch._foreach_clamp_min(params, -problem.threshold)]
        torch._foreach_clamp_max_(within, problem.threshold)
        torch._foreach_sub_(params, within)

    return step


def _l1_loss(problem: Problem) -> Step:
    sgd = problem.sgd(fused=True)

    def step() -> None:
        penalty = torch.stack([p.abs().sum() for p in problem.params]).sum()
        (problem.l1 * penalty).backward()  # type: ignore[no-untyped-call]
        sgd.step()

    return step


def _compiled(step: Callable[..., None], *arguments: Tensor, whole: bool = False) -> Step:
    """Compiles a step and runs it once."""
    compiled = torch.compile(step, fullgraph=whole)

    def run() -> None:
        compiled(*arguments)

    try:
        run()
    except Exception as error:
        raise Missing(f"torch.compile fails here: {first_line(error)}") from error
    return run


def _compiled_sgd(problem: Problem, lr: float | Tensor) -> Step:
    """torch's SGD and a soft-threshold; it is compiled to two graphs, fused=True not at all."""
    sgd = problem.sgd(lr, foreach=True)
    params = problem.params
    factor = problem.l1 * problem.gain

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        threshold = sgd.param_groups[0]["lr"] * factor
        for p in params:
            p.copy_(p.sign() * (p.abs() - threshold).clamp_min(0))

    return _compiled(step)


def _compiled_float_lr(problem: Problem) -> Step:
    return _compiled_sgd(problem, problem.lr)


def _compiled_tensor_lr(problem: Problem) -> Step:
    lr = torch.tensor(problem.lr, device=problem.params[0].device)
    return _with_changing_lr(problem, lr, _compiled_sgd(problem, lr))


def _compiled_whole(problem: Problem) -> Step:
    lr = torch.tensor(problem.lr, device=problem.params[0].device)
    momentum, weight_decay = problem.momentum, problem.weight_decay
    factor = problem.l1 * problem.gain
    triples = [(p, p.grad, torch.zeros_like(p)) for p in problem.params]

    def step(lr: Tensor) -> None:
        with torch.no_grad():
            threshold = lr * factor
            for p, g, m in triples:
                assert g is not None
                m.mul_(momentum).add_(g).add_(p, alpha=weight_decay)
                v = p - lr * m
                p.copy_(v.sign() * (v.abs() - threshold).clamp_min(0))

    return _with_changing_lr(problem, lr, _compiled(step, lr, whole=True))


def _with_changing_lr(problem: Problem, lr: Tensor, step: Step) -> Step:
    """The steps after the first, which has run when a step was compiled."""
    rates = learning_rates(problem, varying=True)
    next(rates)

    def changing() -> None:
        lr.fill_(next(rates))
        step()

    return changing


# ---- other libraries ----------------------------------------------------------------------------


def _pat_lasso(problem: Problem) -> Step:
    try:
        from torchao.prototype.pat.optim import PruneOptimizer
    except ImportError as error:
        raise Missing(f"torchao with prototype.pat: {first_line(error)}") from None
    group = {
        "params": problem.params,
        "prox_type": "ProxLasso",
        "group_type": "ElemGrouper",
        "reg_lambda": problem.l1 * problem.gain,
    }
    base = torch.optim.SGD(
        [group],
        lr=problem.lr,
        momentum=problem.momentum,
        weight_decay=problem.weight_decay,
        fused=True,
    )
    step: Step = PruneOptimizer(base).step
    return step


def _ftrl(problem: Problem) -> Step:
    try:
        from pytorch_optimizer import FTRL
    except ImportError as error:
        raise Missing(f"pytorch_optimizer: {first_line(error)}") from None
    step: Step = FTRL(
        problem.params,
        lr=problem.lr,
        beta=1.0,
        lambda_1=problem.l1,
        lambda_2=problem.weight_decay,
    ).step
    return step


def _proxtorch(problem: Problem) -> Step:
    try:
        from proxtorch.operators import L1
    except ImportError as error:
        raise Missing(f"proxtorch: {first_line(error)}") from None
    sgd = problem.sgd(fused=True)
    operator = L1(alpha=problem.l1 * problem.gain)

    @torch.no_grad()
    def step() -> None:
        sgd.step()
        for p in problem.params:
            p.copy_(operator.prox(p, problem.lr))

    return step


def first_line(error: BaseException) -> str:
    """What an error says, without the rest."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


OURS = "prox"
BASELINES = {
    b.key: b
    for b in (
        Baseline(
            OURS,
            "ProxSGD, native",
            "SGD with momentum, weight decay and the exact L1 proximal map in one pass",
            _native,
        ),
        Baseline(
            "prox_no_l1",
            "ProxSGD, native, l1=0",
            "the same pass without the L1: torch's SGD bit for bit",
            _native_without_l1,
            l1=False,
            option={"l1": 0.0},
        ),
        Baseline(
            "prox_bfloat16_momentum",
            "ProxSGD, native, momentum in bfloat16",
            "momentum_dtype=torch.bfloat16: 16 bytes an element instead of 20",
            _native_with_bfloat16_momentum,
            same_parameters=True,
            # A momentum is off by 2^-9 of itself; ten steps move no weight by more than 0.05.
            tolerance=(1e-5, 1e-4),
        ),
        Baseline(
            "prox_track_sparsity",
            "ProxSGD, native, zeros counted",
            "track_sparsity=True: exact zeros of each tensor are counted in the same pass",
            _native_counting_zeros,
            option={"track_sparsity": True},
        ),
        Baseline(
            "pure",
            "ProxSGD, pure PyTorch",
            "the fallback where the native module isn't built or can't take a tensor",
            _pure,
        ),
        Baseline("sgd_loop", "SGD(loop)", "no L1; foreach=False", _sgd_loop, l1=False),
        Baseline("sgd_foreach", "SGD(foreach)", "no L1; foreach=True", _sgd_foreach, l1=False),
        Baseline("sgd_fused", "SGD(fused)", "no L1; fused=True", _sgd_fused, l1=False),
        Baseline(
            "softshrink",
            "SGD(fused) + softshrink loop",
            "p.copy_(softshrink(p)) for each tensor after the step",
            _fused_softshrink_loop,
        ),
        Baseline(
            "softshrink_in_place",
            "SGD(fused) + softshrink in place",
            "aten.softshrink.out(p, out=p), which torch.nn doesn't offer, for each tensor",
            _fused_softshrink_in_place,
        ),
        Baseline(
            "foreach_threshold",
            "SGD(foreach) + foreach soft-threshold",
            "sign(p)·max(|p| - t, 0) in five torch._foreach operations after the step",
            _foreach_threshold,
        ),
        Baseline(
            "foreach_clamp",
            "SGD(foreach) + foreach clamp",
            "p - clamp(p, -t, t) in three torch._foreach operations after the step",
            _foreach_clamp,
        ),
        Baseline(
            "l1_loss",
            "L1 as a loss term + SGD(fused)",
            "another method: subgradients of l1·Σ|p|, no exact zeros; the penalty's forward and "
            "backward are counted",
            _l1_loss,
            checked_steps=0,
            changes_grads=True,
        ),
        Baseline(
            "compile_tensor",
            "torch.compile(SGD + soft-threshold), tensor lr",
            "optimizer.step() and the threshold in one compiled function; lr is a tensor that "
            "changes at every step",
            _compiled_tensor_lr,
            varying=True,
        ),
        Baseline(
            "compile_float",
            "torch.compile(SGD + soft-threshold), float lr",
            "optimizer.step() and the threshold in one compiled function; compiled anew whenever "
            "lr changes, which isn't counted",
            _compiled_float_lr,
        ),
        Baseline(
            "compile_whole",
            "torch.compile(SGD + soft-threshold by hand), tensor lr",
            "momentum, weight decay and threshold written out so that one graph holds them all; lr "
            "is a tensor that changes at every step",
            _compiled_whole,
            varying=True,
        ),
        Baseline(
            "pat",
            "torchao PAT, lasso, on SGD(fused)",
            "another method from the second step on: the map acts on a copy of latent weights with "
            "a threshold that grows with Σlr; only the first step is the same",
            _pat_lasso,
            checked_steps=1,
        ),
        Baseline(
            "ftrl",
            "pytorch_optimizer FTRL",
            "another method: follow the regularised leader with L1, adaptive, no momentum",
            _ftrl,
            checked_steps=0,
        ),
        Baseline(
            "proxtorch",
            "proxtorch L1 on SGD(fused)",
            "p.copy_(L1.prox(p)) for each tensor after the step",
            _proxtorch,
        ),
    )
}
COMPILED = ("compile_tensor", "compile_float", "compile_whole")


# ---- the check ----------------------------------------------------------------------------------

# Every method here rounds at other places. Ten steps in float32 stay within a few units in the last
# place of weights of size 1; a stored bfloat16 or float16 is off by half a unit at every step.
TOLERANCES = {
    torch.float64: (1e-12, 1e-14),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (STEPS_CHECKED * 2**-8, 1e-3),
    torch.float16: (STEPS_CHECKED * 2**-11, 1e-3),
}


def reference(
    value: Tensor, grad: Tensor, problem: Problem, l1: float, rates: Sequence[float]
) -> Tensor:
    """The method in float64 from the textbook: momentum, then the proximal map."""
    p, g = value.double(), grad.double()
    m = torch.zeros_like(p)
    for lr in rates:
        m = problem.momentum * m + g + problem.weight_decay * p
        p = p - lr * m
        p = p.sign() * (p.abs() - lr * l1 * problem.gain).clamp_min(0)
    return p


@dataclass(frozen=True)
class Check:
    """What comparing a row's weights with the reference gave."""

    steps: int
    same: bool
    deviation: float
    zeros: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return dict(self.__dict__)


class Checker:
    """Compares a row's weights with the reference after its first steps.

    The reference is made once for each set of coefficients, and only for so many elements of every
    tensor (the update is elementwise, the elements are taken all over).
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
        """Takes the steps that are still missing and compares."""
        for _ in range(done, baseline.checked_steps):
            step()
        l1 = problem.l1 if baseline.l1 else 0.0
        rates = tuple(
            itertools.islice(learning_rates(problem, baseline.varying), baseline.checked_steps)
        )
        key = (l1, problem.momentum, *rates)
        if key not in self._references:
            self._references[key] = reference(self._values, self._grads, problem, l1, rates)
        wanted = self._references[key]
        sample = self._sample(problem.params)
        relative, absolute = baseline.tolerance or TOLERANCES[sample.dtype]
        got = sample.double()
        return Check(
            steps=baseline.checked_steps,
            same=bool(torch.allclose(got, wanted, rtol=relative, atol=absolute)),
            deviation=float((got - wanted).abs().max()),
            zeros=float((sample == 0).double().mean()),
        )
