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


def resnet50_row_sets() -> list[tuple[int, list[int]]]:
    """ResNet-50's coupled channels: for each set its rows, and how long they are in each parameter.

    A convolution comes with its norm's weight and bias. What is added up, in the four residual
    streams, is one set.
    """
    sets = [(64, [147, 1, 1])]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        stream = [inside, 1, 1]  # of the shortcut
        for _ in range(blocks):
            sets += [(width, [inside, 1, 1]), (width, [width * 9, 1, 1])]
            stream += [width, 1, 1]
            inside = width * 4
        sets.append((width * 4, stream))
    return sets
