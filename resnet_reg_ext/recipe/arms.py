"""The arms of a comparison: one run each, which differ in regularisation alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .settings import Run

Strengths = Mapping[str, tuple[float, float]]
"""l1 and weight decay by the name of an arm."""
TOWARD_START = ("L2-SP", "L1-SP")
GROUP_LASSO = "group lasso"


def pulls_to_start(run: Run) -> bool:
    """Whether there are arms whose weights are pulled towards the initial ones."""
    return run.weights != "none" and run.channels is None and run.target_sparsity is None


def arms(
    run: Run, strengths: Strengths | None = None, group_lasso: float | None = None
) -> dict[str, Run]:
    """The runs that are compared, by name; a regulariser that is to join them joins them here.

    Where the initial weights are given, "L2-SP" and "L1-SP" are L2 and L1 of what was changed of
    them.

    Args:
        run: what they share, and the ``l1`` and ``weight_decay`` of those that have one of them.
        strengths: of arms that have others than those of ``run``.
        group_lasso: the share of channels that an arm "group lasso" takes out; None for no such.
    """
    own = {
        "none": (0.0, 0.0),
        "L2": (0.0, run.weight_decay),
        "L1": (run.l1, 0.0),
        "elastic net": (run.l1, run.weight_decay),
    }
    if pulls_to_start(run):
        own |= {"L2-SP": (0.0, run.weight_decay), "L1-SP": (run.l1, 0.0)}
    own |= strengths or {}
    found = {name: replace(run, **strength_of(name, *values)) for name, values in own.items()}
    if group_lasso is not None:
        found[GROUP_LASSO] = replace(found["none"], channels=group_lasso, method="prox")
    return found


def strength_of(arm: str, l1: float, weight_decay: float) -> dict[str, Any]:
    """The settings in which an arm differs from the others."""
    toward = "start" if arm in TOWARD_START else "zero"
    return {"l1": l1, "weight_decay": weight_decay, "toward": toward}


def strength_options(strengths: Strengths) -> dict[str, Any]:
    """The strengths of arms as options of ``compare``."""
    options: dict[str, Any] = {}
    for name, (l1, weight_decay) in strengths.items():
        option = name.lower().replace(" ", "_").replace("-", "_")
        options[option] = {"L2-SP": weight_decay, "L1-SP": l1}.get(name, [l1, weight_decay])
    return options
