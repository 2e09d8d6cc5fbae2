"""The kinds of storage that a kernel knows: a parameter's dtype, and options of ProxSGD."""

import reference
import torch

STORAGES = {
    **{dtype: (dtype, {}) for dtype in reference.DTYPES},
    "bfloat16 momentum": ("float32", {"momentum_dtype": torch.bfloat16}),
    "bfloat16 master": ("bfloat16", {"master_weights": True}),
    "bfloat16 master and momentum": (
        "bfloat16",
        {"master_weights": True, "momentum_dtype": torch.bfloat16},
    ),
    "float16 master": ("float16", {"master_weights": True}),
}
