"""Compact models in files: tensors and a plain description of their shapes, without pickle."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..atomic_write import atomic_write
from .shortcuts import Shortcut, replace_blocks
from .surgery import fit_attributes

_FORMAT = "resnet_reg_ext.compact"
_VERSION = 1
# What compaction changes of a layer; all other constants must be the architecture's.
_WIDTHS = {"in_channels", "out_channels", "groups", "in_features", "out_features", "num_features"}
_LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.PReLU)


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
    blocks = [name for name, module in model.named_modules() if isinstance(module, Shortcut)]
    if architecture is None:
        architecture = _architecture_of(model, blocks)
    elif architecture:
        reason = _mismatch(_dense(architecture, "save_compact"), model, blocks)
        if reason is not None:
            raise ValueError(f"save_compact: model is no {architecture}: {reason}")
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "architecture": architecture,
        "layers": {
            name: [list(value.shape), getattr(module, "groups", 1)]
            for name, module in model.named_modules()
            if isinstance(module, _LAYERS) and isinstance(value := _shaping(module), Tensor)
        },
        "shortcuts": blocks,
    }
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            # It writes contiguous tensors, each with memory of its own.
            tensors = {name: value.contiguous().clone() for name, value in state.items()}
            save_file(tensors, temporary, {_FORMAT: json.dumps(description), "format": "pt"})
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
    _check_description(path, description)
    name = description["architecture"]
    if model is None:
        if not name:
            raise ValueError(
                f"load_compact: {path} is of a model that torchvision doesn't have: must be given "
                "one of its class"
            )
        model = _dense(name, f"load_compact: {path}")
    else:
        model = copy.deepcopy(model)
    try:
        replace_blocks(model, description["shortcuts"])
        _shape(model, description["layers"])
        _check_tensors(model, state)
        model.load_state_dict(state, strict=True, assign=True)
        _check_fit(model)
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
                description = json.loads((content.metadata() or {})[_FORMAT])
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
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"load_compact: {path} isn't a compact model: it has no description")
    if not isinstance(state, Mapping):
        raise ValueError(f"load_compact: {path} is damaged: it has no tensors by name")
    return description, dict(state)


def _check_description(path: Path, description: dict[str, Any]) -> None:
    if description.get("version") != _VERSION:
        raise ValueError(
            f"load_compact: {path} has version {description.get('version')!r} of the format: must "
            f"be {_VERSION}"
        )
    layers, blocks = description.get("layers"), description.get("shortcuts")
    good = (
        isinstance(description.get("architecture"), str)
        and isinstance(blocks, list)
        and all(isinstance(name, str) for name in blocks)
        and isinstance(layers, dict)
        and all(isinstance(name, str) and _is_shape(value) for name, value in layers.items())
    )
    if not good:
        raise ValueError(f"load_compact: {path} is damaged: its description isn't one of layers")


def _is_shape(value: Any) -> bool:
    """Whether it is [[sizes], groups], all whole numbers from 1."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], list):
        return False
    return all(type(n) is int and n > 0 for n in (*value[0], value[1]))


def _dense(name: str, who: str) -> nn.Module:
    """A model of torchvision's by its name, without memory for its weights."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"{who}: architecture is {name!r}: must be one of torchvision's models")
    options: dict[str, Any] = {}
    if "init_weights" in inspect.signature(models.get_model_builder(name)).parameters:
        options["init_weights"] = False
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    with torch.device("meta"):
        model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _architecture_of(model: nn.Module, blocks: list[str]) -> str:
    """The smallest of torchvision's models whose layers these are, but for their widths."""
    try:
        from torchvision import models
    except ImportError:
        raise ValueError(
            "save_compact: torchvision isn't installed, whose models are looked through: must be "
            "given an architecture"
        ) from None
    kind, fits, reason = type(model), [], None
    for name in models.list_models(module=models):
        if models.get_model_builder(name).__module__ != kind.__module__:
            continue
        dense = _dense(name, "save_compact")
        mismatch = _mismatch(dense, model, blocks)
        if mismatch is None:
            fits.append((sum(p.numel() for p in dense.parameters()), name))
        reason = reason or mismatch
    if not fits:
        raise ValueError(
            f"save_compact: none of torchvision's models has the layers of this {kind.__name__}"
            f'{f" ({reason})" if reason else ""}: must be given architecture="", and a model of '
            "its class to load"
        )
    count = sum(p.numel() for p in model.parameters())
    large = [name for size, name in sorted(fits) if size >= count]
    chosen: str = large[0] if large else max(fits)[1]
    return chosen


def _mismatch(dense: nn.Module, model: nn.Module, blocks: list[str]) -> str | None:
    """How the model's layers differ from those of a dense one in more than widths."""
    if type(dense) is not type(model):
        return f"it is a {type(model).__name__}, not a {type(dense).__name__}"
    try:
        replace_blocks(dense, blocks)
    except ValueError as error:
        return str(error)
    ours, theirs = dict(model.named_modules()), dict(dense.named_modules())
    for name in sorted({*ours} ^ {*theirs}):
        return f"{name} is only in one of them"
    for name, module in ours.items():
        other = theirs[name]
        if type(module) is not type(other):
            return f"{name} is a {type(module).__name__}, not a {type(other).__name__}"
        for constant in getattr(module, "__constants__", ()):
            if constant not in _WIDTHS:
                one, two = getattr(module, constant, None), getattr(other, constant, None)
                if not isinstance(one, nn.Module) and one != two:
                    return f"{name}.{constant} is {one!r}, not {two!r}"
    for name in sorted({*model.state_dict()} ^ {*dense.state_dict()}):
        return f"{name} is only in one of them"
    return None


def _shaping(module: Any) -> Any:
    """The tensor whose shape says how wide a layer is."""
    return module.weight if module.weight is not None else getattr(module, "running_mean", None)


def _shape(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Gives layers these shapes, without values."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, _LAYERS)}
    for name, (shape, groups) in layers.items():
        module: Any = modules.get(name)
        if module is None or not isinstance(_shaping(module), Tensor):
            raise ValueError(f"{name} is no layer of this model")
        if len(shape) != _shaping(module).dim():
            raise ValueError(
                f"{name} has {len(shape)} dimensions, must have {_shaping(module).dim()}"
            )
        if isinstance(module, _ConvNd):
            outs = shape[1] if module.transposed else shape[0]
            if tuple(shape[2:]) != tuple(module.kernel_size) or outs % groups:
                raise ValueError(f"{name} has a kernel or groups that don't fit: {shape}, {groups}")
        rows = shape[1] if getattr(module, "transposed", False) else shape[0]
        for key, old in list(module._parameters.items()):
            if old is not None:
                new = torch.empty(shape if key == "weight" else (rows,), device="meta")
                module._parameters[key] = nn.Parameter(new, old.requires_grad)
        for key, old in list(module._buffers.items()):
            if old is not None and old.dim() == 1:
                module._buffers[key] = torch.empty(rows, device="meta")
        fit_attributes(module, groups if isinstance(module, _ConvNd) else None)


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


def _check_fit(model: nn.Module) -> None:
    """Refuses layers whose widths don't fit together, by a pass without values."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"{name} has no values")

    def check(module: Any, inputs: tuple[Any, ...]) -> None:
        if inputs[0].shape[1] != module.num_features:
            raise ValueError(
                f"a norm of {module.num_features} channels gets {inputs[0].shape[1]} channels"
            )

    meta = copy.deepcopy(model).to("meta").eval()
    first: Any = next((m for m in meta.modules() if isinstance(m, _ConvNd)), None)
    if first is None:
        return
    for module in meta.modules():
        if isinstance(module, _NormBase):
            module.register_forward_pre_hook(check)
    size = 299 if type(model).__name__ == "Inception3" else 224
    dtype = first.weight.dtype
    with torch.no_grad():
        meta(torch.empty(1, 3, size, size, device="meta", dtype=dtype))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
