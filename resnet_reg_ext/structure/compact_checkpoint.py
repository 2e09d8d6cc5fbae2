"""Compact models in files: tensors and a plain description of their shapes, without pickle."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic_write import atomic_write
from .compact_description import (
    FORMAT,
    architecture_of,
    check_description,
    check_fit,
    dense_model,
    describe,
    mismatch,
    shape_layers,
    shortcuts_of,
)


def save_compact(
    file: str | os.PathLike[str],
    model: nn.Module,
    *,
    architecture: str | None = None,
) -> None:
    """Writes a compact model's tensors and a plain description of its layers.

    Args:
        file: a path. A name that ends in .safetensors selects that format; otherwise
            ``torch.save`` writes plain values, for ``weights_only=True``. An existing file is
            replaced once the new one is complete.
        model: a classification model of torchvision, or what :func:`compact` made of one.
        architecture: torchvision's name for it, such as ``"resnet50"``; None finds it by the
            layers. ``""`` is for a model that torchvision doesn't have: loading the file then needs
            a model of the same class.

    Raises:
        ValueError: no model of torchvision's has its layers; a parameter isn't an ordinary tensor.
        OSError: the file can't be written.

    Example:
        >>> model = remove(model, images[:1], share=0.5).model
        >>> save_compact("small.safetensors", model)
    """
    path = _regular(file, "save_compact")
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise ValueError(f"save_compact: {name} isn't a tensor with values of its own")
    blocks = shortcuts_of(model)
    if architecture is None:
        architecture = architecture_of(model, blocks)
    elif architecture:
        reason = mismatch(dense_model(architecture, "save_compact"), model, blocks)
        if reason is not None:
            raise ValueError(f"save_compact: model is no {architecture}: {reason}")
    description = describe(model, architecture)
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            # It writes contiguous tensors, each with memory of its own.
            tensors = {name: value.contiguous().clone() for name, value in state.items()}
            save_file(tensors, temporary, {FORMAT: json.dumps(description), "format": "pt"})
        else:
            torch.save({**description, "state_dict": state}, temporary)


def load_compact(file: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Reads a file that :func:`save_compact` wrote. No code in the file is run.

    Args:
        file: a path.
        model: for a model that torchvision doesn't have, one of the same class with all its
            channels; a copy of it gets the file's shapes. None constructs torchvision's model.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ValueError: the file is damaged, is something else, or doesn't fit together; what is wrong
            is named.
        OSError: it can't be read.

    Example:
        >>> save_compact("small.safetensors", model)
        >>> model = load_compact("small.safetensors")
    """
    path = _regular(file, "load_compact")
    with path.open("rb"):
        pass
    description, state = _read(path)
    check_description(description, f"load_compact: {path}")
    name = description["architecture"]
    if model is None:
        if not name:
            raise ValueError(
                f"load_compact: {path} is of a model that torchvision doesn't have: must be given "
                "one of its class"
            )
        model = dense_model(name, f"load_compact: {path}")
    else:
        model = copy.deepcopy(model)
    try:
        shape_layers(model, description)
        _check_tensors(model, state)
        model.load_state_dict(state, strict=True, assign=True)
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta:
                raise ValueError(f"{key} has no values")
        check_fit(model)
    except (ValueError, RuntimeError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"load_compact: {path} is damaged: {_first_line(error)}") from None
    return model.eval()


def _regular(file: str | os.PathLike[str], who: str) -> Path:
    path = Path(file)
    if path.exists() and not path.is_file():
        raise ValueError(f"{who}: {path} is not a regular file")
    return path


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as content:
                description = json.loads((content.metadata() or {})[FORMAT])
                names = content.keys()
                state = {name: content.get_tensor(name) for name in names}
        else:
            description = torch.load(path, map_location="cpu", weights_only=True)
            state = description.pop("state_dict")
    except ImportError:
        raise
    # Each format and each kind of damage has an error of its own.
    except Exception as error:
        raise ValueError(
            f"load_compact: {path} isn't a compact model or is damaged: {_first_line(error)}"
        ) from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"load_compact: {path} isn't a compact model: it has no description")
    if not isinstance(state, Mapping):
        raise ValueError(f"load_compact: {path} is damaged: it has no tensors by name")
    return description, dict(state)


def _check_tensors(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuses tensors that aren't the layers'."""
    expected = model.state_dict()
    for name in sorted({*expected} ^ {*state}, key=str):
        raise ValueError(f"{name} is missing or unknown")
    for name, tensor in expected.items():
        value = state[name]
        if type(value) is not Tensor or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} is no ordinary tensor")
        if value.shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, must be {tuple(tensor.shape)}")
        if value.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name} is of {value.dtype}")
        # A stride of 0 makes a tensor of any size from a few bytes.
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise ValueError(f"{name} has fewer values than its shape says")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
