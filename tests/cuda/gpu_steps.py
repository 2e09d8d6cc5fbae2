"""One step of every kind of storage, alignment and option: what compute-sanitizer looks at."""

from __future__ import annotations

import itertools
import sys

import torch

from resnet_reg_ext import ProxSGD
from resnet_reg_ext.functional import prox_sgd_

SIZES = (1, 5, 1023, 4099)
MASTER = {torch.bfloat16, torch.float16}


def skewed(size: int, skew: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that begins so many elements behind its memory's beginning, and ends at its end."""
    return torch.randn(size + skew, device="cuda").to(dtype)[skew:]


def step(dtype: torch.dtype, momentum_dtype: torch.dtype, master: bool, momentum: float) -> None:
    """Steps tensors of all sizes and skews in one launch, a first and a running one."""
    skews = list(itertools.product((0, 1), (0, 1), (0, 1)))
    p, g, m, w = [], [], [], []
    for size, (sp, sg, sm) in itertools.product(SIZES, skews):
        p.append(skewed(size, sp, dtype))
        g.append(skewed(size, sg, dtype))
        m.append(skewed(size, sm, momentum_dtype))
        w.append(p[-1].float())
    for first_step in (True, False):
        prox_sgd_(
            p,
            g,
            m if momentum else None,
            lr=0.1,
            momentum=momentum,
            l1=0.01,
            first_step=first_step,
            master_weights=w if master else None,
            fused=True,
        )


def coupled(dtype: torch.dtype, momentum_dtype: torch.dtype, master: bool, momentum: float) -> None:
    """Steps sets of coupled rows, held and too long for it, with skewed gradients."""
    params, rows = [], []
    for number, (count, widths) in enumerate([(37, (5, 1, 600)), (2, (6001, 1))]):
        for width in widths:
            params.append(torch.nn.Parameter(torch.randn(count, width, device="cuda").to(dtype)))
            rows.append(number)
    optimizer = ProxSGD(
        [{"params": params, "rows": rows}],
        lr=0.1,
        momentum=momentum,
        group_lasso=0.1,
        master_weights=master,
        momentum_dtype=momentum_dtype if momentum_dtype == torch.bfloat16 else None,
        track_sparsity=True,
        fused=True,
    )
    for skew in (0, 1):
        for p in params:
            p.grad = skewed(p.numel(), skew, dtype).view_as(p)
        optimizer.step()


def main() -> None:
    """All kinds, or with --one one of them."""
    kinds = [(d, d, False) for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)]
    kinds += [(torch.float32, torch.bfloat16, False)]
    kinds += [(d, torch.float32, True) for d in (torch.bfloat16, torch.float16)]
    kinds += [(torch.bfloat16, torch.bfloat16, True)]
    for kind in kinds[:1] if "--one" in sys.argv else kinds:
        for momentum in (0.0, 0.9):
            step(*kind, momentum)
            if "--one" not in sys.argv:
                coupled(*kind, momentum)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
