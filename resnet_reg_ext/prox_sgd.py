"""The optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoints, eager_step, group_checks, row_groups
from .backends import native
from .regroup import regrouped
from .sparsity import Sparsity, count, starts_of
from .tracked_zeros import TrackedZeros, known_zeros

_Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class ProxSGD(Optimizer):
    r"""SGD whose step also applies the proximal map of L1, so that weights become exactly zero.

    Minimises

    .. math:: F(w) = f(w) + l_1 \lVert w \rVert_1
              + \tfrac12\, \text{weight\_decay}\, \lVert w \rVert_2^2
              + \text{group\_lasso} \sum_g a_g \lVert w_g \rVert_2

    where f is the loss whose gradients it is given. One step of one element, with
    k = (1 - dampening) / (1 - momentum), or 1 without momentum:

    .. code-block:: text

        d = grad + weight_decay * p              l2_mode="coupled"; d = grad for "proximal"
        m = momentum * m + (1 - dampening) * d   m = d on the parameter's first step
        s = d + momentum * m                     nesterov; else s = m; s = d without momentum
        v = p - lr * s
        p = sign(v) * max(|v| - lr * l1 * k, 0)
        p = p * max(1 - lr * group_lasso * a_g * k / norm(p_g), 0)      rows of a set only
        p = p / (1 + lr * weight_decay * k)      l2_mode="proximal" only

    With ``l1=0`` it is ``torch.optim.SGD``, bit for bit in float32 and float64 (its
    ``foreach=False`` way on a CPU with AVX2), and a checkpoint of either loads into the other.

    With ``toward="start"`` the penalties are those of the distance from w⁰, the parameter's value
    before its first step, so that weights that needn't move stay exactly what they were:

    .. code-block:: text

        d = grad + weight_decay * (p - start)    l2_mode="coupled"
        p = start + sign(v - start) * max(|v - start| - lr * l1 * k, 0)
        p = start + (p - start) * max(1 - lr * group_lasso * a_g * k / norm(p_g - start_g), 0)
        p = start + (p - start) / (1 + lr * weight_decay * k)      l2_mode="proximal" only

    The factor k makes ``l1`` the coefficient in F. Heavy-ball momentum multiplies the effect of a
    gradient by k; a threshold of ``lr * l1`` would stay behind and minimise F with ``l1 / k``.

    Args:
        params: tensors, dicts of parameter groups, or ``model.named_parameters()``. Every option
            below is an option of a group too. Two parameters that share memory are refused, as
            all are stepped at the same time. See :func:`resnet_reg_ext.param_groups`.
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
        group_lasso: coefficient of the group lasso, >= 0 (default: 0). Applies to groups that have
            ``rows`` beside ``params``, an integer or None for each parameter: row i of all
            parameters with one integer, in whichever groups, is one group g of F. ``row_weights``
            has their a_g: None for √(elements), a number, or one for each row.
            :func:`resnet_reg_ext.param_groups` makes both. A set has one first dimension, device,
            dtype, lr, momentum, dampening and group_lasso, and all or no gradients.
        maximize: ascend f instead of descending it (default: False).
        fused: None takes the native kernel, one pass over memory, for every tensor that it can take
            and pure PyTorch for the others; True raises where it can't; False always takes pure
            PyTorch (default: None). The bits are the same, on a CPU with AVX2; on others torch
            rounds a sum with a factor twice, as it does everywhere for a gradient of stride 0.
        capturable: the step may be captured in a CUDA graph: an ``lr`` or ``l1`` that is a CUDA
            tensor is then followed by the graph, and what would need the host to wait raises
            (default: False).
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, on which the update
            is made; the parameter is what it rounds to, and goes back to it if changed otherwise.
            Without it a bfloat16 weight stays where it is if a step is less than 1/512 of it
            (default: False).
        momentum_dtype: the dtype of the momentum buffers: None is the parameter's, or float32 with
            master weights; ``torch.bfloat16`` with float32 parameters saves 4 of the 20 bytes an
            element that a step moves. float64 parameters keep float64 (default: None).
        track_sparsity: count exact zeros in the step's own pass; see :meth:`sparsity` (default:
            False).
        toward: what the penalties pull towards: ``"zero"``, or ``"start"``, the value that a
            parameter has at its first step with this option; the state holds it as ``start``
            (default: ``"zero"``).

    Raises:
        ValueError: an option or a tensor can't be used; it is named with its value, and nothing has
            changed. Options are checked at construction, at :meth:`step` and when loading.
        RuntimeError: ``fused=True`` where the native kernel can't be used.

    Example:
        >>> optimizer = ProxSGD(param_groups(model, l1=1e-5, weight_decay=1e-4), lr=0.1)
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    The parameter's dtype may be float32, float64, bfloat16 or float16. Each stored value is rounded
    once. NaN and infinity are passed on, never turned into zeros. State: ``momentum_buffer``, where
    momentum is not 0, ``master_weight``, where there is one, and with ``toward="start"`` the
    ``start``, in the master weight's dtype or else the parameter's. A checkpoint holds it, for runs
    that are resumed; one of ``torch.optim.SGD`` doesn't, and the next step makes it.

    With a ``torch.amp.GradScaler``, the scaler unscales the gradients and skips steps as it does
    for any optimizer. With ``fused=True`` or ``capturable=True`` both happen inside the step: it
    multiplies by the scale's reciprocal on the way, which leaves ``p.grad`` as it is, scaled, and
    changes nothing if an infinity was found.

    Inside ``torch.compile`` a step is one operator. As with ``torch.optim.SGD``, a float option
    that changes makes it compile anew; make ``lr`` or ``l1`` a tensor where a schedule moves it. Of
    DTensors (FSDP2, tensor parallelism) each process steps its own shard; a gradient with other
    placements than its parameter is redistributed. Groups with ``rows`` step outside the compiled
    graph, and their DTensors must be divided by rows, as FSDP2 does.

    References:
        Combettes and Wajs, *Signal recovery by proximal forward-backward splitting*, 2005, eq. 3.6;
        Zou and Hastie, *Regularization and variable selection via the elastic net*, 2005; Li,
        Grandvalet and Davoine, *Explicit inductive bias for transfer learning with convolutional
        networks*, 2018, for ``toward="start"``. Yang et al., *ProxSGD*, 2020, have the name and
        another method: their averages' weights change, and a step goes part of the way.
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
        group_lasso: float | Tensor = 0.0,
        maximize: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        master_weights: bool = False,
        momentum_dtype: torch.dtype | None = None,
        track_sparsity: bool = False,
        toward: str = "zero",
        **unknown: Any,
    ) -> None:
        group_checks.refuse_unknown(unknown)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "l1": l1,
            "l2_mode": l2_mode,
            "group_lasso": group_lasso,
            "rows": None,
            "row_weights": None,
            "maximize": maximize,
            "fused": fused,
            "frozen_zeros": False,
            "capturable": capturable,
            "master_weights": master_weights,
            "momentum_dtype": momentum_dtype,
            "track_sparsity": track_sparsity,
            "toward": toward,
        }
        row_groups.check_group(defaults, "ProxSGD: ")
        self._constructing = True
        super().__init__(params, defaults)
        del self._constructing
        group_checks.check_memory(self.param_groups)
        row_groups.check_used(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, checked first.

        Raises:
            TypeError: it is no dict, or what it lists aren't tensors.
            ValueError: an option is out of its range, or a parameter can't be used, is listed
                twice or shares memory with another.
            RuntimeError: ``fused=True``, and there is no native module.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        index = len(self.param_groups)
        group = {**self.defaults, **param_group}
        where = f"ProxSGD: param_groups[{index}]: "
        row_groups.check_group(group, where)
        if group["fused"] and not native.available():
            raise RuntimeError(f"{where}fused=True, but {native.missing}")
        super().add_param_group(group_checks.with_names_apart(param_group))
        try:
            group = self.param_groups[-1]
            group_checks.check_params(group, index)
            row_groups.check_group(group, where, len(group["params"]))
            if "_constructing" not in self.__dict__:  # else once, of all groups together
                group_checks.check_memory(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, new: dict[str, Any]) -> None:
        """Restores a pickle or, at the end of ``load_state_dict``, a checkpoint.

        What a checkpoint of ``torch.optim.SGD`` lacks, such as ``l1``, stays the live group's, as
        do always the options that say how to compute, such as ``fused``.
        """
        live: list[dict[str, Any]] = self.__dict__.get("param_groups", [])
        defaults: dict[str, Any] = new.get("defaults") or self.__dict__["defaults"]
        checkpoints.complete(new, live, defaults, self.__dict__.get("_checkpoint"))
        super().__setstate__(new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of a ``ProxSGD`` or a ``torch.optim.SGD``.

        The checkpoint's groups may be others than the optimizer's, such as the single one of
        ``SGD(model.parameters())`` for ``ProxSGD(param_groups(model))``. Parameters are then told
        by their names, or by the model's order and the momentum buffers' shapes where these leave
        one way; each live group keeps its penalties and takes lr, momentum, dampening, nesterov
        and maximize from the checkpoint.

        Momentum buffers, master weights and starts get the dtype that the live group's options say,
        and keep their bits where they are saved in it.

        Raises:
            ValueError: the checkpoint is of another model, its groups are others and can't be
                assigned, or an option in it is out of its range.
        """

        def begin(_: Optimizer, checkpoint: dict[str, Any]) -> dict[str, Any]:
            checkpoints.check_momentum(checkpoint["param_groups"])
            checkpoint = regrouped(checkpoint, self.param_groups)
            self._checkpoint = checkpoint
            return checkpoint

        # Registered last, so that it sees what other hooks have made of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(begin)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_checkpoint", None)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling, and skipping the step, to the step."""
        return any(group["fused"] or group["capturable"] for group in self.param_groups)

    def freeze_zeros(self, freeze: bool = True) -> None:
        """Keeps what is zero at zero and stops the shrinkage, for a final phase of training.

        The weights that L1 has left are trained on without its bias: it no longer reduces their
        magnitudes, and the zeros stay. (Known as debiasing or refitting on the support.) Applies
        to the groups whose ``l1`` or ``group_lasso`` is above 0, or was before a schedule took it
        to 0, and sets their option ``frozen_zeros``, which a checkpoint holds. With
        ``toward="start"`` weights that are at their start stay there.

        Args:
            freeze: False ends it, in all groups.

        Raises:
            ValueError: there is no such group.
        """
        groups = [g for g in self.param_groups if not freeze or row_groups.shrinks(g)]
        if not groups:
            raise ValueError(
                "ProxSGD: freeze_zeros: no parameter group has an l1 or a group_lasso above 0; set "
                "frozen_zeros in the groups that are meant"
            )
        for group in groups:
            group["frozen_zeros"] = freeze

    def sparsity(self) -> Sparsity:
        """Exact zeros, parameter by parameter, as :func:`resnet_reg_ext.sparsity` counts them.

        Of groups with ``toward="start"`` the weights that are at their start.

        With ``track_sparsity=True`` the last step counted them on its way. Parameters whose version
        autograd has raised since are counted anew, as are all after a step inside
        ``torch.compile``, and DTensors. Changes through ``p.data`` raise no version: after those,
        call ``resnet_reg_ext.sparsity(optimizer)``, which always counts.
        """
        return count(self, self._zeros_known())

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
        if torch.compiler.is_compiling():
            from . import compiled_step

            compiled_step.step(self, grad_coefficient)
        else:
            eager_step.step(self, grad_coefficient)
        return loss

    def _init_group(self, *arguments: Any) -> str:
        """Collects a group's tensors. torch.compile calls it, and doesn't trace it."""
        from . import compiled_step

        return compiled_step.init_group(self, *arguments)

    def _zeros_known(self) -> dict[Tensor, Tensor]:
        """What the last step that counted did count, of the parameters that are as it left them."""
        tracked: list[TrackedZeros] = self.__dict__.get("_tracked_zeros", [])
        return known_zeros(tracked, starts_of(self)) if tracked else {}
