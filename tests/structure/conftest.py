"""Helpers of this folder are imported by name; small layers need one thread."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch_pruning")


@pytest.fixture(autouse=True)
def _few_threads(one_thread):
    """See tests/conftest.py."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
