"""A ResNet-50 without some of its channels: its shapes in checkpoints, and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.compact_description import (
    FORMAT,
    check_description,
    check_fit,
    dense_model,
    describe,
    shape_layers,
)
from .files import RecipeError

__all__ = ["FORMAT", "checked_description", "description_of", "give_shapes", "to_channels_last"]

ARCHITECTURE = "resnet50"
_HEAD = "fc"


def description_of(model: nn.Module) -> dict[str, Any] | None:
    """The shapes of a ResNet-50's layers as plain values; None if it has all of its channels."""
    description = describe(model, ARCHITECTURE)
    layers = {name: shape for name, shape in description["layers"].items() if name != _HEAD}
    return None if layers == _dense_layers() else description


@cache
def _dense_layers() -> dict[str, Any]:
    layers: dict[str, Any] = describe(dense_model(ARCHITECTURE, ""), ARCHITECTURE)["layers"]
    return {name: shape for name, shape in layers.items() if name != _HEAD}


def checked_description(content: Any, where: object) -> dict[str, Any] | None:
    """What a file holds as the shapes of a compact model; None where it holds none.

    Raises:
        RecipeError: it is damaged, or of another architecture.
    """
    if content is None:
        return None
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise RecipeError(f"{where} is damaged: its shapes aren't those of a compact model")
    try:
        check_description(content, str(where))
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if content["architecture"] != ARCHITECTURE:
        raise RecipeError(
            f"{where} is a compact {content['architecture'] or 'model of another class'}, not a "
            f"{ARCHITECTURE}"
        )
    return {key: value for key, value in content.items() if key != "state_dict"}


def give_shapes(
    model: nn.Module,
    description: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: object,
) -> None:
    """Gives a dense ResNet-50 a compact one's shapes. Values are to be filled in afterwards.

    The head keeps its number of classes, and gets random values.

    Args:
        model: a ResNet-50 with all channels.
        description: the compact one's, checked.
        state: its tensors under torchvision's names, whose shapes are compared before any memory
            is taken.
        where: the file, for errors.

    Raises:
        RecipeError: description and tensors don't fit together, or aren't a ResNet-50's.
    """
    classes = model.get_submodule(_HEAD).out_features
    layers = dict(description["layers"])
    if len(layers.get(_HEAD, [[]])[0]) != 2:
        raise RecipeError(f"{where} is damaged: its shapes have no {_HEAD} of two dimensions")
    layers[_HEAD] = [[classes, layers[_HEAD][0][1]], 1]
    try:
        shape_layers(model, {**description, "layers": layers})
        for name, tensor in model.state_dict().items():
            # Files from before torch 0.4.1 have no such counters.
            if name.startswith(f"{_HEAD}.") or name.endswith("num_batches_tracked"):
                continue
            if name not in state:
                raise ValueError(f"{name} is missing")
            value = state[name]
            if value.shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, must be {tuple(tensor.shape)}")
            # A stride of 0 makes a tensor of any size from a few bytes.
            if value.untyped_storage().nbytes() < value.numel() * value.element_size():
                raise ValueError(f"{name} has fewer values than its shape says")
        check_fit(model)
    except (ValueError, RuntimeError, TypeError, IndexError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"{where} is damaged: {reason:.300}") from None
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            module.reset_parameters()
    to_channels_last(model)


@torch.no_grad()
def to_channels_last(model: nn.Module) -> None:
    """Lays all kernels out alike, also those whose strides are ambiguous, as of 1x1 kernels.

    oneDNN adds in another order where strides differ: a run that is resumed would not end with the
    same bits. ``module.to(memory_format=...)`` leaves such strides as they are.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            alike = torch.empty_like(parameter, memory_format=torch.channels_last)
            parameter.data = alike.copy_(parameter)
