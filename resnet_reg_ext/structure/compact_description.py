"""The shapes of a compact model in plain values, and a model of such shapes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .shortcuts import Shortcut, replace_blocks
from .surgery import fit_attributes

FORMAT = "resnet_reg_ext.compact"
_VERSION = 1
# What compaction changes of a layer; all other constants must be the architecture's.
_WIDTHS = {"in_channels", "out_channels", "groups", "in_features", "out_features", "num_features"}
_LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.PReLU)


def describe(model: nn.Module, architecture: str) -> dict[str, Any]:
    """What a file tells of a model beside its tensors: plain values alone.

    Args:
        model: a dense or a compact one.
        architecture: torchvision's name for it, "" if it has none.
    """
    return {
        "format": FORMAT,
        "version": _VERSION,
        "architecture": architecture,
        "layers": {
            name: [list(value.shape), getattr(module, "groups", 1)]
            for name, module in model.named_modules()
            if isinstance(module, _LAYERS) and isinstance(value := _shaping(module), Tensor)
        },
        "shortcuts": shortcuts_of(model),
    }


def shortcuts_of(model: nn.Module) -> list[str]:
    """The residual blocks that are only their shortcut."""
    return [name for name, module in model.named_modules() if isinstance(module, Shortcut)]


def check_description(description: Mapping[str, Any], where: str) -> None:
    """Refuses what :func:`describe` doesn't give.

    Raises:
        ValueError: says what is wrong; ``where`` names the file.
    """
    if description.get("version") != _VERSION:
        raise ValueError(
            f"{where} has version {description.get('version')!r} of the format: must be {_VERSION}"
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
        raise ValueError(f"{where} is damaged: its description isn't one of layers")


def _is_shape(value: Any) -> bool:
    """Whether it is [[sizes], groups], all whole numbers from 1."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], list):
        return False
    return all(type(n) is int and n > 0 for n in (*value[0], value[1]))


def dense_model(name: str, who: str) -> nn.Module:
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


def architecture_of(model: nn.Module, blocks: list[str]) -> str:
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
        dense = dense_model(name, "save_compact")
        difference = mismatch(dense, model, blocks)
        if difference is None:
            fits.append((sum(p.numel() for p in dense.parameters()), name))
        reason = reason or difference
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


def mismatch(dense: nn.Module, model: nn.Module, blocks: list[str]) -> str | None:
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


def shape_layers(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Gives a dense model a description's shapes and shortcuts. Its layers lose their values.

    Args:
        model: of the class that was described; its layers' tensors are on the meta device then.
        description: what :func:`check_description` has passed.

    Raises:
        ValueError: the model has no such layer or block, or a shape doesn't fit it.
    """
    replace_blocks(model, description["shortcuts"])
    layers: Mapping[str, Any] = description["layers"]
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


def check_fit(model: nn.Module) -> None:
    """Refuses layers whose widths don't fit together, by a pass without values.

    Raises:
        Exception: a ValueError of ours, or what torch raises on such a pass.
    """

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
