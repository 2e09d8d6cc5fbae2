"""Regularised, sparse training of ResNet-50s: SGD with an exact L1 proximal step, fused."""

from importlib.metadata import version as _version

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
