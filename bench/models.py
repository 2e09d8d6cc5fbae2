"""What is stepped: lists of parameter shapes, and tensors of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

Shape = tuple[int, ...]

FLAT = "flat25m"
TORCHVISION = {"resnet50": "ResNet-50", "resnet18": "ResNet-18", "vit_b_16": "ViT-B/16"}
TITLES = {**TORCHVISION, FLAT: "one flat tensor"}


class Missing(Exception):
    """A library that a row needs isn't there; says which."""


@dataclass(frozen=True)
class Layout:
    """How a model's tensors are made."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


def shapes(model: str) -> list[Shape]:
    """Shapes of all parameters of a model, in the model's order.

    Args:
        model: a key of TITLES.

    Raises:
        Missing: torchvision, which knows the models, isn't installed.
    """
    if model == FLAT:
        return [(25_000_000,)]
    try:
        import torchvision
    except ImportError as error:
        raise Missing(f"{TITLES[model]}'s shapes come from torchvision: {error}") from None
    with torch.device("meta"):
        return [tuple(p.shape) for p in getattr(torchvision.models, model)().parameters()]


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
