"""A ResNet-50 with an eighth of the channels inside its blocks, in place of the recipe's.

Depth, names and the channels between the blocks stay, and a fifth of the weights is left: most of a
tiny run's time goes into initial weights and checkpoints.
"""

import functools
from collections.abc import Callable

import torch
from torchvision.models import resnet50

from resnet_reg_ext.recipe import model, shapes
from resnet_reg_ext.structure.compact_description import describe

narrow = functools.partial(resnet50, width_per_group=8)


def install(set_attribute: Callable[..., object] = setattr) -> None:
    """From now on the recipe trains it, and doesn't take it for one that lost channels."""
    with torch.device("meta"):
        layers = describe(narrow(), shapes.ARCHITECTURE)["layers"]
    del layers["fc"]
    set_attribute(model, "resnet50", narrow)
    set_attribute(shapes, "_dense_layers", lambda: layers)
