"""The optimizer."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _distributed, _hooks, _native
from .functional import (
    Bucket,
    DeviceValues,
    Hyperparameters,
    check_state,
    hyperparameters,
    is_capturing,
    number_in,
    prepare_prox_sgd,
    scalar,
)
from .sparsity import Sparsity, has_l1, sparsity

if TYPE_CHECKING:
    from ._compiled import Row

_Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


# Compiled code holds a number that stands for its optimizer for as long as that lives. It is a
# string, as dynamo makes a variable of an integer that it has seen change.
optimizers_by_number: weakref.WeakValueDictionary[str, ProxSGD] = weakref.WeakValueDictionary()
_numbers = itertools.count()


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
            below is an option of a group too. No two parameters may share memory, as all are
            stepped at the same time. See :func:`resnet_reg_ext.param_groups`.
        lr: learning rate, >= 0 (default: 1e-3). A one-element tensor is read at each step.
        momentum: in [0, 1) (default: 0.9).
        dampening: in [0, 1] (default: 0).
        weight_decay: coefficient of ½‖w‖² in F, >= 0 (default: 1e-4).
        nesterov: Nesterov's momentum; needs a momentum and no dampening (default: False).
        l1: coefficient of ‖w‖₁ in F, >= 0 (default: 1e-5). A one-element tensor is read at each
            step.
        l2_mode: ``"coupled"`` adds weight_decay * p to the gradient, as SGD does; ``"proximal"``
            divides by 1 + lr * weight_decay * k after the shrinkage, the elastic net's proximal map
            in closed form (default: ``"coupled"``).
        maximize: ascend f instead of descending it (default: False).
        fused: None takes the native kernel, one pass over memory, for every tensor that it can take
            and pure PyTorch for the others; True raises where it can't; False always takes pure
            PyTorch (default: None). The bits are the same, on a CPU with AVX2; on others torch
            rounds a sum with a factor twice.
        capturable: the step may be captured in a CUDA graph: an ``lr`` or ``l1`` that is a CUDA
            tensor is then followed by the graph, and what would need the host to wait raises
            (default: False).
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, on which the update
            is made; the parameter is what it rounds to. A parameter that is changed in another way,
            or by a step without this option, goes back to its copy's value at the next step with
            it. Without it a bfloat16 weight stays where it is if a step is less than 1/512 of the
            weight (default: False).
        momentum_dtype: the dtype of the momentum buffers: None is the parameter's, or float32 with
            master weights; ``torch.bfloat16`` with float32 parameters saves 4 of the 20 bytes an
            element that a step moves. float64 parameters keep float64 (default: None).
        track_sparsity: count exact zeros in the step's own pass; see :meth:`sparsity` (default:
            False).

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
    momentum is not 0, and ``master_weight``, where there is one.

    With a ``torch.amp.GradScaler``, the scaler unscales the gradients and skips steps as it does
    for any optimizer. With ``fused=True`` or ``capturable=True`` both happen inside the step: it
    multiplies by the scale's reciprocal on the way, which leaves ``p.grad`` as it is, scaled, and
    changes nothing if an infinity was found.

    Inside ``torch.compile`` a step is one operator that reads the options when it runs, so that a
    learning rate that changes compiles nothing anew. Of DTensors (FSDP2, tensor parallelism) each
    process steps its own part; a gradient divided otherwise than its parameter is redistributed.

    References:
        Combettes and Wajs, *Signal recovery by proximal forward-backward splitting*, 2005, eq. 3.6;
        Zou and Hastie, *Regularization and variable selection via the elastic net*, 2005; Yang et
        al., *ProxSGD: Training structured neural networks under regularization and constraints*,
        2020, whose method averages gradients with weights that change from step to step and goes
        part of the way to the proximal point; this one is SGD with a proximal step.
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
        l1: float | Tensor = 1e-5,
        l2_mode: str = "coupled",
        maximize: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        master_weights: bool = False,
        momentum_dtype: torch.dtype | None = None,
        track_sparsity: bool = False,
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
            "frozen_zeros": False,
            "capturable": capturable,
            "master_weights": master_weights,
            "momentum_dtype": momentum_dtype,
            "track_sparsity": track_sparsity,
        }
        _check(defaults, "ProxSGD: ")
        super().__init__(params, defaults)
        self._prepare_for_compiling()

    def _prepare_for_compiling(self) -> None:
        """What ``_compiled`` needs; a pickle or a copy doesn't have it."""
        if "_number" not in self.__dict__:
            self._number = str(next(_numbers))
            optimizers_by_number[self._number] = self
        self._forget_traced()

    def _forget_traced(self) -> None:
        """Makes compiled code look at groups and state anew."""
        self._groups_traced: list[dict[str, Any]] = []
        self._states_traced: list[list[dict[str, Any]]] = []

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps ``step`` in hooks and a profiler's range; torch calls it for each class."""
        return _hooks.profile_hook_step(func)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, checked first.

        Raises:
            TypeError: it is no dict, or what it lists aren't tensors.
            ValueError: an option is out of its range, or a parameter can't be used, or is listed
                twice.
            RuntimeError: ``fused=True``, and there is no native module.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        index = len(self.param_groups)
        group = {**self.defaults, **param_group}
        where = f"ProxSGD: param_groups[{index}]: "
        _check(group, where)
        if group["fused"] and not _native.available():
            raise RuntimeError(f"{where}fused=True, but {_native.missing}")
        param_group = _with_names_apart(param_group)
        super().add_param_group(param_group)
        try:
            _check_params(self.param_groups[-1], index)
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or, at the end of ``load_state_dict``, a checkpoint.

        What a checkpoint of ``torch.optim.SGD`` lacks, as ``l1``, stays the live group's, as do
        always the options that say how to compute and not what: ``fused`` and the like.
        """
        live: list[dict[str, Any]] = self.__dict__.get("param_groups", [])
        defaults: dict[str, Any] = state.get("defaults") or self.__dict__["defaults"]
        checkpoint: dict[str, Any] | None = self.__dict__.get("_checkpoint")
        for index, group in enumerate(state["param_groups"]):
            kept = live[index] if index < len(live) else defaults
            for key, value in defaults.items():
                group.setdefault(key, kept.get(key, value))
            if live:
                for key in _HOW_TO_COMPUTE:
                    group[key] = kept[key]
                if "param_names" in kept:
                    group.setdefault("param_names", kept["param_names"])
            _check(group, f"ProxSGD: param_groups[{index}]: ")
            for i, param in enumerate(group["params"]):
                of_param = state["state"].get(param, {})
                for key, value in of_param.items():
                    if key in _STATE_KEYS and value is not None:
                        check_state(param, value, key, partial(_name, group, index, i))
                        _distributed.check_alike(param, value, key, _name(group, index, i))
                if checkpoint is not None and of_param:
                    saved_id = checkpoint["param_groups"][index]["params"][i]
                    _restore_dtypes(group, param, of_param, checkpoint["state"][saved_id])
        super().__setstate__(state)
        self._prepare_for_compiling()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of a ``ProxSGD`` or a ``torch.optim.SGD``.

        Momentum buffers and master weights get the dtype that the live group's options say, and
        keep their bits where they are saved in it; torch's own loading would cast them to the
        parameter's dtype first.

        Raises:
            ValueError: the checkpoint is of another model, or an option in it is out of its range.
        """
        # Registered last, so that it sees what other hooks have made of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(lambda _, final: self._begin_loading(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_checkpoint", None)

    def _begin_loading(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model; keeps it for :meth:`__setstate__`."""
        saved, live = checkpoint["param_groups"], self.param_groups
        if len(saved) != len(live):
            raise ValueError(
                f"ProxSGD: the checkpoint has {len(saved)} param_groups: must be {len(live)}, as "
                "many as the optimizer has"
            )
        for index, (one, other) in enumerate(zip(saved, live, strict=True)):
            if "momentum" not in one:
                raise ValueError(
                    f"ProxSGD: param_groups[{index}]: the checkpoint has no momentum: must be a "
                    "ProxSGD's or a torch.optim.SGD's"
                )
            if len(one["params"]) != len(other["params"]):
                raise ValueError(
                    f"ProxSGD: param_groups[{index}]: the checkpoint has {len(one['params'])} "
                    f"parameters: must be {len(other['params'])}, as many as the optimizer has"
                )
        self._checkpoint = checkpoint

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling, and skipping the step, to the step."""
        return any(group["fused"] or group["capturable"] for group in self.param_groups)

    def freeze_zeros(self, freeze: bool = True) -> None:
        """Keeps what is zero at zero and stops the shrinkage, for a final phase of training.

        The weights that L1 has left are trained on without its bias: their magnitudes are no longer
        reduced by it, and the zeros stay. (Known as debiasing or refitting on the support.) Applies
        to the groups whose ``l1`` is above 0, or was before a schedule took it to 0; it sets their
        option ``frozen_zeros``, which a checkpoint holds, and leaves ``l1`` as it is.

        Args:
            freeze: False ends it, in all groups.

        Raises:
            ValueError: there is no such group.
        """
        groups = [group for group in self.param_groups if not freeze or has_l1(group)]
        if not groups:
            raise ValueError(
                "ProxSGD: freeze_zeros: no parameter group has an l1 above 0; set frozen_zeros in "
                "the groups that are meant"
            )
        for group in groups:
            group["frozen_zeros"] = freeze

    def sparsity(self) -> Sparsity:
        """Exact zeros, parameter by parameter, as :func:`resnet_reg_ext.sparsity` counts them.

        With ``track_sparsity=True`` they were counted in the last step and need no reading of the
        parameters; those that were changed in another way since then, in a way that autograd
        notices, are counted anew, as are all after a step inside ``torch.compile``, and DTensors.
        """
        return sparsity(self)

    @overload
    def step(
        self, closure: None = None, *, grad_coefficient: float | Tensor | None = None
    ) -> None: ...

    @overload
    def step(
        self, closure: Callable[[], float], *, grad_coefficient: float | Tensor | None = None
    ) -> float: ...

    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_coefficient: float | Tensor | None = None,
    ) -> float | None:
        """Performs one step on every parameter that has a gradient.

        Everything is checked before anything is changed.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_coefficient: the step takes the gradients times this number, or one-element tensor;
                in float32. Clips without a pass over the gradients to scale them, which stay as
                they are: ``norm = torch.nn.utils.get_total_norm(grads)``, then
                ``step(grad_coefficient=(max_norm / (norm + 1e-6)).clamp(max=1.0))``.

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

        scaling = self._scaling(grad_coefficient)
        if torch.compiler.is_compiling():
            from . import _compiled

            _compiled.step(self, scaling)
        else:
            self._step(scaling)
        return loss

    def _step(self, scaling: DeviceValues | None) -> None:
        """The step of all groups."""
        runs: list[Callable[[], None]] = []
        created: _New = []
        counted: list[_Counted] = []
        states = _StatesInOrder(self.state)
        for index, group in enumerate(self.param_groups):
            h, values = _options(group, index, scaling)
            for bucket, new in _buckets(group, h.momentum != 0, states):
                name = partial(_name_of, group, index, bucket.params)
                run = self._prepare(bucket, group, h, name, values)
                if run is None:
                    continue
                runs.append(run)
                created += new
                if bucket.zeros is not None:
                    found_inf = None if values is None else values.found_inf
                    counted.append(_Counted(bucket.params, bucket.zeros, found_inf))
        for run in runs:
            run()
        for param, key, value in created:
            if value is None:
                del self.state[param][key]
            else:
                self.state.setdefault(param, {})[key] = value
        if created and self._groups_traced:
            self._forget_traced()
        if counted:
            self._counted = [c.with_stamps() for c in counted]

    def _step_on(
        self,
        rows: list[Row],
        tensors: dict[int, dict[str, Tensor]],
        grad_scale: Tensor | None,
        grad_coefficient: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The step of all groups on tensors that compiled code hands over.

        They may be copies of the parameters and the state, made by the compiler.
        """
        for row in rows:
            group = self._groups_traced[row.group]
            param = group["params"][row.position]
            state, traced = self.state.get(param, _NO_STATE), self._state_traced(row)
            if group is not self.param_groups[row.group] or (
                state is not traced and (state or traced)
            ):
                raise RuntimeError(
                    "ProxSGD: param_groups or state was replaced since the step was compiled; call "
                    "torch.compiler.reset()"
                )
            if has_master(group, param) is not (row.master is not None):
                raise RuntimeError(
                    f"{_name(group, row.group, row.position)}: master_weights is "
                    f"{group['master_weights']}, but was not when the step was compiled; call "
                    "torch.compiler.reset()"
                )
        scaling = _given(grad_scale, grad_coefficient, found_inf)
        alike: dict[tuple[int, bool, bool], list[Row]] = {}
        for row in rows:
            alike.setdefault((row.group, row.first, row.master is not None), []).append(row)
        runs = []
        for (index, first, with_master), members in alike.items():
            group = {**self.param_groups[index], **tensors.get(index, {})}
            h, values = _options(group, index, scaling)
            params, grads, momenta, masters = (
                [getattr(row, key) for row in members]
                for key in ("param", "grad", "momentum", "master")
            )
            # A first step without momentum would leave the new buffers unwritten.
            if (h.momentum != 0) is not (momenta[0] is not None) and (first or h.momentum != 0):
                raise RuntimeError(
                    f"ProxSGD: param_groups[{index}]: momentum is {h.momentum}, but was "
                    f"{'not ' if h.momentum == 0 else ''}0 when the step was compiled; call "
                    "torch.compiler.reset()"
                )
            bucket = Bucket(
                params,
                grads,
                momenta if h.momentum != 0 else None,
                masters if with_master else None,
                first,
            )
            name = partial(_name_at, group, index, [row.position for row in members])
            run = self._prepare(bucket, group, h, name, values)
            if run is not None:
                runs.append(run)
        for run in runs:
            run()
        for row in rows:
            if row.first or row.master is not None:
                param = self.param_groups[row.group]["params"][row.position]
                self.state.setdefault(param, self._state_traced(row))

    def _prepare(
        self,
        bucket: Bucket,
        group: dict[str, Any],
        h: Hyperparameters,
        name: Callable[[int], str],
        values: DeviceValues | None,
    ) -> Callable[[], None] | None:
        """The step of a bucket, checked; None if it is to be skipped."""
        if not group["capturable"] and is_capturing() and any(p.is_cuda for p in bucket.params):
            raise RuntimeError(
                f"{name(0)}: a CUDA graph is being captured, which would repeat the step with the "
                "options of now: capturable is False in its group"
            )
        return prepare_prox_sgd(bucket, h, group["fused"], name, values)

    def _state_traced(self, row: Row) -> dict[str, Any]:
        return self._states_traced[row.group][row.position]

    def _scaling(self, grad_coefficient: float | Tensor | None) -> DeviceValues | None:
        """What a GradScaler and the caller say of the gradients; None if nothing."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if grad_coefficient is not None and not isinstance(grad_coefficient, Tensor):
            number = number_in(grad_coefficient, "ProxSGD: grad_coefficient")
            # Rounded to float32 later, whatever the default dtype and device are.
            grad_coefficient = torch.tensor(number, dtype=torch.float64, device="cpu")
        if grad_coefficient is not None:
            scalar(grad_coefficient, "ProxSGD: grad_coefficient")
        return _given(grad_scale, grad_coefficient, found_inf)

    def _zeros_known(self) -> dict[Tensor, Tensor]:
        """What the last step counted, for the parameters that are still as it left them."""
        counted: list[_Counted] = self.__dict__.get("_counted", [])
        return {p: zeros for c in counted for p, zeros in c.unchanged()}


def _given(
    grad_scale: Tensor | None, grad_coefficient: Tensor | None, found_inf: Tensor | None
) -> DeviceValues | None:
    """What is said of the gradients; None if nothing."""
    if grad_scale is None and grad_coefficient is None and found_inf is None:
        return None
    return DeviceValues(
        grad_scale=_distributed.whole(grad_scale),
        grad_coefficient=_distributed.whole(grad_coefficient),
        found_inf=_distributed.whole(found_inf),
    )


def _options(
    group: dict[str, Any], index: int, scaling: DeviceValues | None
) -> tuple[Hyperparameters, DeviceValues | None]:
    """A group's options, checked, and what a kernel is to read on the device."""
    on_device: dict[str, Tensor] = {}
    h = _check(group, f"ProxSGD: param_groups[{index}]: ", on_device)
    if on_device:
        return h, (scaling or DeviceValues())._replace(**on_device)
    return h, scaling


# Options that say how to compute: a checkpoint doesn't change them.
_HOW_TO_COMPUTE = ("fused", "capturable", "master_weights", "momentum_dtype", "track_sparsity")
_STATE_KEYS = ("momentum_buffer", "master_weight")
_MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16)


def _check(
    group: dict[str, Any], where: str, on_device: dict[str, Tensor] | None = None
) -> Hyperparameters:
    """Checks the options that :func:`hyperparameters` checks, and those of the state."""
    h = hyperparameters(group, where, on_device)
    if group["momentum_dtype"] not in _MOMENTUM_DTYPES:
        raise ValueError(
            f"{where}momentum_dtype is {group['momentum_dtype']!r}: must be None, torch.float32 or "
            "torch.bfloat16"
        )
    return h


def _check_params(group: dict[str, Any], index: int) -> None:
    """Refuses parameters that a step can't be right for, whatever their gradients."""
    places: dict[int, int] = {}
    for i, param in enumerate(group["params"]):
        if not torch.nn.parameter.is_lazy(param) and param.is_neg():
            raise ValueError(
                f"{_name(group, index, i)}: is a lazily negated view: call resolve_neg() on it"
            )
        first = places.setdefault(id(param), i)
        if first != i:
            raise ValueError(
                f"{_name(group, index, i)}: is the same parameter as "
                f"{_place(group, index, first)}: list it once"
            )


def has_master(group: dict[str, Any], param: Tensor) -> bool:
    """Whether a parameter has a float32 copy in the state."""
    return bool(group["master_weights"]) and param.dtype in _SIXTEEN_BITS


def momentum_dtype_of(group: dict[str, Any], param: Tensor) -> torch.dtype:
    """What a parameter's momentum buffer is stored in."""
    dtype: torch.dtype | None = group["momentum_dtype"]
    if dtype is None or param.dtype is torch.float64:
        return torch.float32 if has_master(group, param) else param.dtype
    return dtype


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def new_momentum(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A momentum buffer, to be written by the parameter's first step."""
    return torch.empty_like(param, dtype=dtype, requires_grad=False)


def new_master(param: Tensor) -> Tensor:
    """A float32 copy of a parameter."""
    return param.detach().to(torch.float32)


def _restore_dtypes(
    group: dict[str, Any], param: Tensor, state: dict[str, Any], saved: dict[str, Any]
) -> None:
    """Gives a parameter's loaded state the dtypes that its group's options say.

    torch has cast it to the parameter's dtype; where another one is wanted, it is taken from what
    was ``saved``.
    """
    if "master_weight" in state and not (
        group["master_weights"] and saved["master_weight"].dtype is torch.float32
    ):
        # Of another dtype it has been through another optimizer, which has trained the parameter
        # and let this be: the next step makes a new one from the parameter.
        del state["master_weight"]
    wanted = {"momentum_buffer": momentum_dtype_of(group, param), "master_weight": torch.float32}
    for key, dtype in wanted.items():
        if state.get(key) is not None and state[key].dtype is not dtype:
            state[key] = saved[key].to(param.device, dtype, copy=True)


_Stamp = tuple[int, int, torch.UntypedStorage]


def _stamp(param: Tensor) -> _Stamp | None:
    """What changes where a parameter does; None for one that doesn't tell.

    The storage is held, as the address of one that is gone may be another's.
    """
    try:
        return param._version, param.data_ptr(), param.untyped_storage()
    except RuntimeError:  # an inference tensor has no version
        return None


def _is_as_stamped(param: Tensor, stamp: _Stamp | None) -> bool:
    now = _stamp(param)
    if now is None or stamp is None:
        return False
    return now[:2] == stamp[:2] and now[2] is stamp[2]


class _Counted(NamedTuple):
    """Zeros that a step has counted."""

    params: list[Tensor]
    zeros: Tensor
    found_inf: Tensor | None
    stamps: tuple[_Stamp | None, ...] = ()

    def with_stamps(self) -> _Counted:
        return self._replace(stamps=tuple(map(_stamp, self.params)))

    def unchanged(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that are as the step left them, with their zeros."""
        if self.found_inf is not None and self.found_inf.item() != 0:
            return []  # the kernel skipped the step, counting included
        return [
            (p, zeros)
            for p, zeros, stamp in zip(self.params, self.zeros, self.stamps, strict=True)
            if _is_as_stamped(p, stamp)
        ]


class _StatesInOrder:
    """Looks up the states of lists of parameters, without hashing where it can.

    A tensor's hash is a Python call, which makes 161 look-ups a sixth of the step on small tensors.
    State is mostly created in the order of the parameters; where its keys are, one by one, the
    parameters asked for, the entries are taken as they come.
    """

    def __init__(self, state: dict[Tensor, dict[str, Any]]) -> None:
        self._state = state
        self._next = 0

    @functools.cached_property
    def _entries(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        return list(self._state), list(self._state.values())

    def of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """The states of some parameters; empty ones for those that have none yet."""
        keys, values = self._entries
        stop = self._next + len(params)
        ahead = keys[self._next : stop]
        if len(ahead) == len(params) and all(map(operator.is_, ahead, params)):
            states = values[self._next : stop]
            self._next = stop
            return states
        return [self._state.get(p, _NO_STATE) for p in params]


_NO_STATE: dict[str, Any] = {}


_New = list[tuple[Tensor, str, Tensor | None]]


def _buckets(
    group: dict[str, Any], with_momentum: bool, states: _StatesInOrder
) -> list[tuple[Bucket, _New]]:
    """The parameters of a group that have a gradient, those at their first step apart.

    With each bucket, the state that was created for it, or is out of date: (parameter, key, value
    or None).
    """
    params: list[Tensor] = list(group["params"])
    grads: list[Any] = [p.grad for p in params]
    if NoneType in set(map(type, grads)):
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
        grads = [g for g in grads if g is not None]
    if not params:
        return []
    has_masters, tracks = group["master_weights"], group["track_sparsity"]
    if not with_momentum and not has_masters:
        return _tracked([(Bucket(params, grads, None, None, False), [])], tracks)
    in_order = states.of(params)
    momenta: list[Any] | None = None
    if with_momentum:
        momenta = [state.get("momentum_buffer") for state in in_order]
        if NoneType not in set(map(type, momenta)) and not has_masters:
            return _tracked([(Bucket(params, grads, momenta, None, False), [])], tracks)

    # Created in the order of the parameters, which _StatesInOrder makes use of later.
    masters: list[Any] = [None] * len(params)
    new: _New = []
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, param in enumerate(params):
        first = momenta is not None and momenta[i] is None
        if momenta is not None and first:
            momenta[i] = new_momentum(param, momentum_dtype_of(group, param))
            new.append((param, "momentum_buffer", momenta[i]))
        master = has_master(group, param)
        if master:
            masters[i] = in_order[i].get("master_weight")
            if masters[i] is None:
                masters[i] = new_master(param)
                new.append((param, "master_weight", masters[i]))
        elif "master_weight" in in_order[i]:
            # Of when the parameter had 16 bits; this step leaves it behind.
            new.append((param, "master_weight", None))
        kinds.setdefault((first, master), []).append(i)
    buckets = []
    for (first, master), members in kinds.items():
        chosen = set(map(id, (params[i] for i in members)))
        buckets.append(
            (
                Bucket(
                    [params[i] for i in members],
                    [grads[i] for i in members],
                    None if momenta is None else [momenta[i] for i in members],
                    [masters[i] for i in members] if master else None,
                    first,
                ),
                [row for row in new if id(row[0]) in chosen],
            )
        )
    return _tracked(buckets, tracks)


def _tracked(buckets: list[tuple[Bucket, _New]], tracks: bool) -> list[tuple[Bucket, _New]]:
    """Gives buckets counters if zeros are counted; each is on one device then."""
    # Of DTensors no count is kept: not every way to load them raises their version.
    if not tracks or any(_distributed.has_dtensors(bucket.params) for bucket, _ in buckets):
        return buckets
    tracked = []
    for bucket, new in buckets:
        devices: dict[torch.device, list[int]] = {}
        for i, param in enumerate(bucket.params):
            devices.setdefault(param.device, []).append(i)
        for device, members in devices.items():
            part = bucket if len(devices) == 1 else bucket.pick(members)
            zeros = torch.zeros(len(members), dtype=torch.int64, device=device)
            chosen = set(map(id, part.params))
            tracked.append(
                (part._replace(zeros=zeros), [row for row in new if id(row[0]) in chosen])
            )
    return tracked


def _name_of(group: dict[str, Any], group_index: int, bucket: list[Tensor], index: int) -> str:
    """The name of a bucket's parameter, for an error."""
    wanted = bucket[index]
    return _name(group, group_index, next(i for i, p in enumerate(group["params"]) if p is wanted))


def _name_at(group: dict[str, Any], group_index: int, positions: list[int], index: int) -> str:
    """The name of the parameter at one of several positions in a group, for an error."""
    return _name(group, group_index, positions[index])


def _name(group: dict[str, Any], group_index: int, index: int) -> str:
    """What an error about a parameter begins with."""
    return f"ProxSGD: {_place(group, group_index, index)}"


def _place(group: dict[str, Any], group_index: int, index: int) -> str:
    """Where a parameter is, and its name if it has one."""
    names = group.get("param_names")
    name = f" ({names[index]})" if names and index < len(names) else ""
    return f"param_groups[{group_index}]['params'][{index}]{name}"


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
