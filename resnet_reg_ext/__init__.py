"""Regularised, sparse training of ResNet-50s: SGD with an exact L1 proximal step, fused."""

import warnings as _warnings
from importlib.metadata import version as _version

with _warnings.catch_warnings():
    # Where there is no NumPy, torch warns while it is imported; only the recipe needs NumPy.
    _warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from . import functional
from .param_groups import param_groups
from .patch import apply_patch, save_patch
from .prox_sgd import ProxSGD
from .schedules import L1Scheduler
from .sparsity import LayerSparsity, Sparsity, sparsity
from .structure import (
    channels,
    compact,
    importance,
    load_compact,
    remove,
    save_compact,
    zero_dead_columns,
)
from .target_sparsity import TargetSparsity

__version__ = _version("resnet_reg_ext")
__all__ = [
    "L1Scheduler",
    "LayerSparsity",
    "ProxSGD",
    "Sparsity",
    "TargetSparsity",
    "apply_patch",
    "channels",
    "compact",
    "functional",
    "importance",
    "load_compact",
    "param_groups",
    "remove",
    "save_compact",
    "save_patch",
    "sparsity",
    "zero_dead_columns",
]
