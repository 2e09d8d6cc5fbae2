"""Models as lists of parameter shapes, and tensors of those shapes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from .keys import FLAT

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Device, dtype and memory format of a model's tensors."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


def shapes(model: str) -> list[Shape]:
    """Shapes of all parameters of a model, in the order in which torchvision has them.

    Args:
        model: a key of MODELS.
    """
    if model == FLAT:
        return [(25_000_000,)]
    if model == "vit_b_16":
        return _vision_transformer(width=768, hidden=3072, layers=12, patch=16, pixels=224)
    if model == "resnet18":
        return _residual_network((2, 2, 2, 2), kernels=(3, 3), expansion=1)
    return _residual_network((3, 4, 6, 3), kernels=(1, 3, 1), expansion=4)


def _residual_network(blocks: Sequence[int], kernels: Sequence[int], expansion: int) -> list[Shape]:
    """He et al., 2015, table 1: convolutions without bias, each with a norm's scale and shift."""

    def convolution(outside: int, inside: int, kernel: int) -> list[Shape]:
        return [(outside, inside, kernel, kernel), (outside,), (outside,)]

    made = convolution(64, 3, 7)
    inside = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            block_inside = inside
            for position, kernel in enumerate(kernels):
                outside = width * (expansion if position == len(kernels) - 1 else 1)
                made += convolution(outside, inside, kernel)
                inside = outside
            if block == 0 and block_inside != inside:
                made += convolution(inside, block_inside, 1)
    return [*made, (1000, inside), (1000,)]


def coupled(model: str) -> list[int | None]:
    """The set of coupled channels that each parameter of a ResNet-50 belongs to, or None.

    Args:
        model: ``"resnet50"``: one set for the first convolution, for each block's first two, and
            for each stage's sums, to which the last convolution of each block and the shortcut's
            write.

    Raises:
        ValueError: it is another model.
    """
    if model != "resnet50":
        raise ValueError(f"model is {model!r}: must be 'resnet50'")
    count = itertools.count()
    numbers: list[int | None] = [next(count)] * 3
    for blocks in (3, 4, 6, 3):
        stage = next(count)
        for block in range(blocks):
            for number in (next(count), next(count), stage):
                numbers += [number] * 3
            if block == 0:
                numbers += [stage] * 3
    return [*numbers, None, None]


def _vision_transformer(
    width: int, hidden: int, layers: int, patch: int, pixels: int
) -> list[Shape]:
    """Dosovitskiy et al., 2020, table 1."""

    def linear(outside: int, inside: int) -> list[Shape]:
        return [(outside, inside), (outside,)]

    norm: list[Shape] = [(width,), (width,)]
    layer = [
        *norm,
        *linear(3 * width, width),
        *linear(width, width),
        *norm,
        *linear(hidden, width),
        *linear(width, hidden),
    ]
    positions = (pixels // patch) ** 2 + 1
    first: list[Shape] = [(1, 1, width), (width, 3, patch, patch), (width,), (1, positions, width)]
    return [*first, *(layer * layers), *norm, *linear(1000, width)]


def split(elements: int, count: int) -> list[Shape]:
    """Shapes of ``count`` flat tensors of nearly equal size, ``elements`` elements in all."""
    return [((elements + i) // count,) for i in range(count)]


def numel(sizes: Sequence[Shape]) -> int:
    """Elements in all shapes."""
    return sum(torch.Size(s).numel() for s in sizes)


def tensors(sizes: Sequence[Shape], layout: Layout, scale: float, seed: int) -> list[Tensor]:
    """Normal random tensors, whose values depend on the seed and not on the layout."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        t = torch.randn(size, generator=generator).mul_(scale).to(layout.device, layout.dtype)
        if layout.channels_last and t.dim() == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        made.append(t)
    return made


def parameters(values: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Parameter]:
    """Parameters with copies of the values and with the gradients themselves."""
    made = [Parameter(v.clone(memory_format=torch.preserve_format)) for v in values]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = grad
    return made
