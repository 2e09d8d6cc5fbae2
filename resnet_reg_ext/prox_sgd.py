"""The optimizer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import partial
from types import NoneType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _native
from .functional import check_momentum, hyperparameters, prepare_prox_sgd

_Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class ProxSGD(Optimizer):
    r"""SGD whose step also applies the proximal map of L1, so that weights become exactly zero.

    Minimises

    .. math:: F(w) = f(w) + l_1 \lVert w \rVert_1
              + \tfrac12\, \text{weight\_decay}\, \lVert w \rVert_2^2

    where f is the loss whose gradients it is given. One step of one element, with
    k = (1 - dampening) / (1 - momentum), or 1 without momentum:

    .. code-block:: text

        d = grad + weight_decay * p              l2_mode="coupled"; d = grad for "proximal"
        m = momentum * m + (1 - dampening) * d   m = d on the parameter's first step
        s = d + momentum * m                     nesterov; else s = m; s = d without momentum
        v = p - lr * s
        p = sign(v) * max(|v| - lr * l1 * k, 0)
        p = p / (1 + lr * weight_decay * k)      l2_mode="proximal" only

    With ``l1=0`` it is ``torch.optim.SGD``, bit for bit in float32 and float64 (its
    ``foreach=False`` way on a CPU with AVX2), and a checkpoint of either loads into the other.

    The factor k makes ``l1`` the coefficient in F. Heavy-ball momentum multiplies the effect of a
    gradient by k; a threshold of ``lr * l1`` would stay behind and minimise F with ``l1 / k``.

    Args:
        params: tensors, dicts of parameter groups, or ``model.named_parameters()``. Every option
            below is an option of a group too. See :func:`resnet_reg_ext.param_groups`.
        lr: learning rate, >= 0 (default: 1e-3). A one-element tensor is read at each step.
        momentum: in [0, 1) (default: 0.9).
        dampening: in [0, 1] (default: 0).
        weight_decay: coefficient of ½‖w‖² in F, >= 0 (default: 1e-4).
        nesterov: Nesterov's momentum; needs a momentum and no dampening (default: False).
        l1: coefficient of ‖w‖₁ in F, >= 0 (default: 1e-5).
        l2_mode: ``"coupled"`` adds weight_decay * p to the gradient, as SGD does; ``"proximal"``
            divides by 1 + lr * weight_decay * k after the shrinkage, the elastic net's proximal map
            in closed form (default: ``"coupled"``).
        maximize: ascend f instead of descending it (default: False).
        fused: None takes the native kernel, one pass over memory, for every tensor that it can take
            and pure PyTorch for the others; True raises where it can't; False always takes pure
            PyTorch (default: None). The bits are the same.

    Raises:
        ValueError: an option or a tensor can't be used; it is named with its value, and nothing has
            changed. Options are checked at construction, at :meth:`step` and when loading.
        RuntimeError: ``fused=True`` where the native kernel can't be used.

    Example:
        >>> optimizer = ProxSGD(model.parameters(), lr=0.1, l1=1e-5, weight_decay=1e-4)
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    The parameter's dtype may be float32, float64, bfloat16 or float16. Each stored value is rounded
    once. NaN and infinity are passed on, never turned into zeros. State: ``momentum_buffer``, where
    momentum is not 0.

    References:
        Combettes and Wajs, *Signal recovery by proximal forward-backward splitting*, 2005, eq. 3.6;
        Zou and Hastie, *Regularization and variable selection via the elastic net*, 2005; Yang et
        al., *ProxSGD: Training structured neural networks under regularization and constraints*,
        2020.
    """

    def __init__(
        self,
        params: _Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        *,
        l1: float = 1e-5,
        l2_mode: str = "coupled",
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "l1": l1,
            "l2_mode": l2_mode,
            "maximize": maximize,
            "fused": fused,
        }
        hyperparameters(defaults, "ProxSGD: ")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, checked first.

        Raises:
            ValueError: an option is out of its range, or a parameter can't be used.
        """
        index = len(self.param_groups)
        group = {**self.defaults, **param_group}
        hyperparameters(group, f"ProxSGD: param_groups[{index}]: ")
        if group["fused"] and not _native.available():
            raise RuntimeError(f"ProxSGD: fused=True, but {_native.missing}")
        param_group = _with_names_apart(param_group)
        super().add_param_group(param_group)
        for i, param in enumerate(self.param_groups[-1]["params"]):
            if param.is_neg():
                group = self.param_groups.pop()
                raise ValueError(
                    f"{_name(group, index, i)}: is a lazily negated view: call resolve_neg() on it"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or, at the end of ``load_state_dict``, a checkpoint.

        A checkpoint of ``torch.optim.SGD`` has no ``l1`` and no ``l2_mode``: the live group's stay,
        as ``fused`` always does.
        """
        live: list[dict[str, Any]] = self.__dict__.get("param_groups", [])
        defaults = state.get("defaults") or self.__dict__.get("defaults", {})
        for index, group in enumerate(state["param_groups"]):
            kept = live[index] if index < len(live) else defaults
            for key, value in defaults.items():
                group.setdefault(key, kept.get(key, value))
            if live:
                group["fused"] = kept["fused"]
                if "param_names" in kept:
                    group.setdefault("param_names", kept["param_names"])
            where = f"ProxSGD: param_groups[{index}]: "
            hyperparameters(group, where)
            for i, param in enumerate(group["params"]):
                buffer = state["state"].get(param, {}).get("momentum_buffer")
                if buffer is not None:
                    check_momentum(param, buffer, _name(group, index, i))
        super().__setstate__(state)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step on every parameter that has a gradient.

        Everything is checked before anything is changed.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None without one.

        Raises:
            ValueError: an option, or a gradient's shape, device, dtype or layout, is wrong.
            RuntimeError: ``fused=True`` and a tensor can't go the native way; says which and why.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        runs = []
        created: list[tuple[Tensor, Tensor]] = []
        states = _StatesInOrder(self.state)
        for index, group in enumerate(self.param_groups):
            h = hyperparameters(group, f"ProxSGD: param_groups[{index}]: ")
            for bucket in _buckets(group["params"], states if h.momentum != 0 else None):
                runs.append(
                    prepare_prox_sgd(
                        bucket.params,
                        bucket.grads,
                        bucket.momenta,
                        h,
                        bucket.first,
                        group["fused"],
                        partial(_name_of, group, index, bucket.params),
                    )
                )
                if bucket.first and bucket.momenta is not None:
                    created += zip(bucket.params, bucket.momenta, strict=True)
        for run in runs:
            run()
        for param, buffer in created:
            self.state[param]["momentum_buffer"] = buffer
        return loss


class _Bucket(NamedTuple):
    """Parameters of one group that are all, or all not, at their first step."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor] | None
    first: bool


class _StatesInOrder:
    """Looks up the states of lists of parameters, without hashing where it can.

    A tensor's hash is a Python call, which makes 161 look-ups a sixth of the step on small tensors.
    State is mostly created in the order of the parameters; where its keys are, one by one, the
    parameters asked for, the entries are taken as they come.
    """

    def __init__(self, state: dict[Tensor, dict[str, Any]]) -> None:
        self._state = state
        self._keys = list(state)
        self._values = list(state.values())
        self._next = 0

    def of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        stop = self._next + len(params)
        keys = self._keys[self._next : stop]
        if len(keys) == len(params) and all(map(operator.is_, keys, params)):
            states = self._values[self._next : stop]
            self._next = stop
            return states
        return [self._state.get(p, _NO_STATE) for p in params]


_NO_STATE: dict[str, Any] = {}


def _buckets(params: list[Tensor], states: _StatesInOrder | None) -> list[_Bucket]:
    """The parameters that have a gradient, those at their first step apart.

    Without ``states`` there is no momentum and no first step.
    """
    grads: list[Any] = [p.grad for p in params]
    if NoneType in set(map(type, grads)):
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
        grads = [g for g in grads if g is not None]
    if not params:
        return []
    if states is None:
        return [_Bucket(params, grads, None, False)]
    momenta: list[Any] = [state.get("momentum_buffer") for state in states.of(params)]
    if NoneType not in set(map(type, momenta)):
        return [_Bucket(params, grads, momenta, False)]
    old = [i for i, m in enumerate(momenta) if m is not None]
    new = [i for i, m in enumerate(momenta) if m is None]
    for i in new:
        momenta[i] = torch.empty_like(params[i], requires_grad=False)
    return [
        _Bucket([params[i] for i in s], [grads[i] for i in s], [momenta[i] for i in s], first)
        for s, first in ((old, False), (new, True))
        if s
    ]


def _name_of(group: dict[str, Any], group_index: int, bucket: list[Tensor], index: int) -> str:
    """The name of a bucket's parameter, for an error."""
    wanted = bucket[index]
    return _name(group, group_index, next(i for i, p in enumerate(group["params"]) if p is wanted))


def _name(group: dict[str, Any], group_index: int, index: int) -> str:
    names = group.get("param_names")
    name = f" ({names[index]})" if names else ""
    return f"ProxSGD: param_groups[{group_index}]['params'][{index}]{name}"


def _with_names_apart(group: dict[str, Any]) -> dict[str, Any]:
    """Takes (name, tensor) pairs apart for a torch whose Optimizer can't: before 2.6."""
    params = group["params"]
    if _OPTIMIZER_KNOWS_NAMES or isinstance(params, Tensor):
        return group
    params = list(params)
    if params and isinstance(params[0], tuple):
        names, tensors = zip(*params, strict=True)
        return {**group, "params": list(tensors), "param_names": list(names)}
    return {**group, "params": params}


_OPTIMIZER_KNOWS_NAMES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 6)
