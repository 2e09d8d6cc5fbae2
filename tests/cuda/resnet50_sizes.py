"""Elements of ResNet-50's parameters, for programs that have no torchvision."""

from __future__ import annotations


def resnet50_sizes() -> list[int]:
    """Elements of ResNet-50's 161 parameters, in order (He et al., 2015, table 1)."""
    sizes = [64 * 3 * 49, 64, 64]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [inside * width, width, width, width * width * 9, width, width]
            sizes += [width * 4 * width, width * 4, width * 4]
            if block == 0:
                sizes += [inside * width * 4, width * 4, width * 4]
            inside = width * 4
    return [*sizes, 1000 * inside, 1000]


def resnet50_groups() -> list[list[int]]:
    """The same in the two groups of ``param_groups``: weights, and vectors."""
    sizes = resnet50_sizes()
    weights = [*sizes[:-2:3], sizes[-2]]
    return [weights, [n for i, n in enumerate(sizes[:-2]) if i % 3] + sizes[-1:]]
