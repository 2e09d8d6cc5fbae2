"""What a model costs: parameters and multiply-adds."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_multiply_adds(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of convolutions and linear layers for one image.

    Args:
        model: isn't changed; a copy without values is run.
        image_size: height and width in pixels.
    """
    meta = copy.deepcopy(model).to("meta").eval()
    weight = next(meta.parameters())
    image = torch.empty(1, 3, image_size, image_size, dtype=weight.dtype, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(image)
    return int(counter.get_total_flops()) // 2


def shortened(count: int) -> str:
    """A large number in thousands, millions or billions: 23.5 M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {letter}"
    return str(count)
