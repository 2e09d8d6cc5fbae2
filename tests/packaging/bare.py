"""The beginning of a program that finds of the extras' packages none, as after `pip install .`."""

from __future__ import annotations

EXTRAS = (
    *("numpy", "scipy", "sklearn", "torchvision", "lightning", "torchmetrics", "tensorboard"),
    *("PIL", "matplotlib", "tqdm", "yaml", "safetensors", "torch_pruning"),
)
BARE = f"""
import sys
from importlib.machinery import PathFinder
class _Fewer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {EXTRAS}
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path[:] = [_Fewer if finder is PathFinder else finder for finder in sys.meta_path]
"""
