"""Finds parameters whose length a parametrization divides out, such as weight norm's direction."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def scale_invariant_parameters(model: nn.Module) -> set[nn.Parameter]:
    r"""The parameters v of a model with f(2v) = f(v), where f is the parametrization they are in.

    The loss doesn't depend on the length of such a v, so nothing holds it against L1 or weight
    decay: v goes to exactly 0, and v/\|v\| to 0/0, which is NaN.

    Parametrizations of ``torch.nn.utils.parametrize`` are evaluated, torch's own and a user's
    alike, on a copy in float32 on the CPU with random parameters: v is scale-invariant if doubling
    it changes the result by less than 1 %, but replacing it changes the result. Neither the
    model, its buffers nor torch's random state change. The older ``torch.nn.utils.weight_norm``
    and ``spectral_norm``, which are hooks, are told by their class.

    What a layer does to its weight in its own ``forward`` is not seen.

    Warns:
        UserWarning: a parametrization raised an error when evaluated in this way; its parameters
            are taken not to be scale-invariant.
    """
    found: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                suffix = "_v" if isinstance(hook, WeightNorm) else "_orig"
                parameter = module._parameters.get(hook.name + suffix)
                found.update(() if parameter is None else (parameter,))
        if isinstance(module, ParametrizationList):
            found.update(_scale_invariant_in(module, name))
    return found


def _scale_invariant_in(parametrization: ParametrizationList, name: str) -> list[nn.Parameter]:
    parameters = [p for p in parametrization.parameters() if p.is_floating_point()]
    try:
        generator = torch.Generator().manual_seed(0)
        drawn, other = ([_drawn(p, generator) for p in parameters] for _ in range(2))

        def evaluate(i: int, value: Tensor) -> Tensor:
            return _evaluate(parametrization, parameters, [*drawn[:i], value, *drawn[i + 1 :]])

        return [
            parameter
            for i, parameter in enumerate(parameters)
            if _are_close(result := evaluate(i, drawn[i]), evaluate(i, 2 * drawn[i]))
            and not all(_are_close(result, evaluate(i, v)) for v in (-drawn[i], other[i]))
        ]
    except Exception as error:  # of a user's parametrization: it may be any
        warnings.warn(
            f"param_groups: can't tell whether {name} is scale-invariant, as it raised "
            f"{type(error).__name__} ({error}) on random parameters: its parameters are grouped by "
            "their names and shapes. Name in exclude those whose length it divides out",
            stacklevel=4,
        )
        return []


def _evaluate(
    parametrization: ParametrizationList, parameters: Sequence[nn.Parameter], values: list[Tensor]
) -> Tensor:
    """The parametrization's result with these values for its parameters."""
    # deepcopy puts the values where it meets the parameters, so that a DTensor or a tensor on the
    # meta device, which has no values, is never read. A fresh copy for every evaluation, and the
    # same random numbers: one that keeps a vector of a power iteration starts from the same.
    memo: dict[int, Tensor] = {
        id(p): nn.Parameter(v, p.requires_grad) for p, v in zip(parameters, values, strict=True)
    }
    generator = torch.Generator().manual_seed(1)
    memo.update({id(b): _drawn(b, generator) for b in parametrization.buffers() if b.is_meta})
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)  # torch.manual_seed would change CUDA's too
        clone = copy.deepcopy(parametrization, memo).to("cpu", torch.float32)
        result: Tensor = clone()
        return result.float()


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32)


def _are_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 0.01 * a.norm())
