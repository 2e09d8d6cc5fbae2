"""Residual blocks whose branch gives nothing but zeros, replaced by their shortcut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .channel_sets import ChannelSet


class Shortcut(nn.Module):
    """A residual block without its branch.

    Args:
        downsample: what is applied to the input; None passes it on.
        activation: what is applied to the sum; None where the block has none.
    """

    def __init__(self, downsample: nn.Module | None, activation: nn.Module | None) -> None:
        super().__init__()
        self.downsample = downsample
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """What the block would give if its branch gave zeros."""
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.activation is None else self.activation(x)


def shortcut_of(block: nn.Module) -> Shortcut | None:
    """The shortcut of a known residual block (torchvision's, timm's ResNets); None of others."""
    known = _parts(block)
    if known is None:
        return None
    shortcut = Shortcut(*known[2:])
    activation: Any = shortcut.activation
    if getattr(activation, "inplace", False):
        # It is given the block's input now and no sum, and autograd may need that as it is.
        activation.inplace = False
    shortcut.training = block.training
    return shortcut


def _parts(block: Any) -> tuple[str, str | None, nn.Module | None, nn.Module | None] | None:
    """Names of the branch's last layer and norm; what the shortcut consists of."""
    kind = f"{type(block).__module__}.{type(block).__name__}"
    if kind == "torchvision.models.resnet.BasicBlock":
        return "conv2", "bn2", block.downsample, block.relu
    if kind == "torchvision.models.resnet.Bottleneck":
        return "conv3", "bn3", block.downsample, block.relu
    if kind in ("timm.models.resnet.BasicBlock", "timm.models.resnet.Bottleneck"):
        last = "2" if kind.endswith("BasicBlock") else "3"
        return f"conv{last}", f"bn{last}", block.downsample, getattr(block, f"act{last}")
    inverted = kind == "torchvision.models.mobilenetv2.InvertedResidual"
    if inverted and block.use_res_connect:
        count = len(block.conv)
        return f"conv.{count - 2}", f"conv.{count - 1}", None, None
    mbconv = kind == "torchvision.models.efficientnet.MBConv"
    if mbconv and block.use_res_connect:
        last = f"block.{len(block.block) - 1}"
        return f"{last}.0", f"{last}.1", None, None
    return None


def dead_branches(
    model: nn.Module, sets: Sequence[ChannelSet], live: Sequence[Tensor]
) -> list[str]:
    """Residual blocks whose branch gives exactly zeros, in training and in evaluation.

    All columns of the branch's last layer belong to channels that are zero, and what comes behind
    adds nothing: no bias, and a norm that leaves zeros zero.

    Args:
        model: any module.
        sets: its coupled channels.
        live: for each set which channels aren't zero.
    """
    dead_columns: dict[str, int] = {}
    for one, of_set in zip(sets, live, strict=True):
        for index in one.consumers:
            count = sum(
                len(at)
                for at, alive in zip(index.indices, of_set.tolist(), strict=True)
                if not alive
            )
            dead_columns[index.tensor] = dead_columns.get(index.tensor, 0) + count
    found = []
    for path, block in model.named_modules():
        parts = _parts(block)
        if not path or parts is None:
            continue
        last: Any = block.get_submodule(parts[0])
        columns = last.weight.shape[1]
        if dead_columns.get(f"{path}.{parts[0]}.weight", 0) < columns or _any(last.bias):
            continue
        norm: Any = block.get_submodule(parts[1]) if parts[1] else None
        if norm is None or _keeps_zeros(norm):
            found.append(path)
    return found


def _keeps_zeros(norm: Any) -> bool:
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.weight is None:
        return False
    moved = torch.zeros_like(norm.weight) if norm.running_mean is None else norm.running_mean
    return not _any(norm.bias) and not _any(norm.weight.detach() * moved)


def _any(tensor: Tensor | None) -> bool:
    return tensor is not None and bool((tensor.detach() != 0).any())


def replace_blocks(model: nn.Module, blocks: Sequence[str]) -> None:
    """Puts shortcuts in the place of blocks.

    Raises:
        ValueError: there is no such block, or it has no shortcut.
    """
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    for path in blocks:
        shortcut = shortcut_of(modules[path]) if path in modules else None
        if shortcut is None:
            raise ValueError(f"{path} is no residual block with a shortcut")
        parent, _, local = path.rpartition(".")
        model.get_submodule(parent)._modules[local] = shortcut
