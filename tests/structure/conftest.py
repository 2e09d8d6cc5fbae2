"""Helpers of this folder are imported by name; small layers need one thread."""

import pytest
import torch

pytest.importorskip("torch_pruning")


@pytest.fixture(autouse=True)
def _few_threads(one_thread):
    """See tests/conftest.py."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
