"""What is stepped: lists of parameter shapes, and tensors of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

Shape = tuple[int, ...]

FLAT = "flat25m"
TITLES = {
    "resnet50": "ResNet-50",
    "resnet18": "ResNet-18",
    "vit_b_16": "ViT-B/16",
    FLAT: "one flat tensor",
}


class Missing(Exception):
    """A library that a row needs isn't there; says which."""


@dataclass(frozen=True)
class Layout:
    """How a model's tensors are made."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


def shapes(model: str) -> list[Shape]:
    """Shapes of all parameters of a model, in the order in which torchvision has them.

    Args:
        model: a key of TITLES.
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
            came = inside
            for place, kernel in enumerate(kernels):
                outside = width * (expansion if place == len(kernels) - 1 else 1)
                made += convolution(outside, inside, kernel)
                inside = outside
            if block == 0 and came != inside:
                made += convolution(inside, came, 1)
    return [*made, (1000, inside), (1000,)]


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
    places = (pixels // patch) ** 2 + 1
    first: list[Shape] = [(1, 1, width), (width, 3, patch, patch), (width,), (1, places, width)]
    return [*first, *(layer * layers), *norm, *linear(1000, width)]


def split(elements: int, count: int) -> list[Shape]:
    """``elements`` elements in ``count`` flat tensors as equal as can be."""
    return [((elements + i) // count,) for i in range(count)]


def numel(sizes: Sequence[Shape]) -> int:
    """Elements in all shapes."""
    return sum(torch.Size(s).numel() for s in sizes)


def tensors(sizes: Sequence[Shape], layout: Layout, scale: float, seed: int) -> list[Tensor]:
    """Normal random tensors, the same for the same seed whatever the layout."""
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
