"""Training with group_lasso settles at the minimiser of F, whole groups exactly at 0 or start."""

import functools

import numpy as np
import pytest
import torch
from test_minimiser import TRAJECTORIES
from torch import nn

from resnet_reg_ext import ProxSGD

GROUPS, WIDTH = 12, 4  # a group: a row of a matrix and an element of a vector
WEIGHT_DECAY = 0.2
WEIGHTS = 1 + 0.1 * np.arange(GROUPS)
STARTS = {
    "zero": np.zeros((GROUPS, WIDTH + 1)),
    "start": 0.4 * np.random.default_rng(8).standard_normal((GROUPS, WIDTH + 1)),
}


def gain(options):
    return (1 - options.get("dampening", 0.0)) / (1 - options["momentum"])


def data(toward):
    """The truth leaves every third group of the start."""
    generator = np.random.default_rng(5)
    x = generator.standard_normal((160, GROUPS * (WIDTH + 1)))
    x[:, 5:] += 0.5 * x[:, :-5]
    truth = np.zeros((GROUPS, WIDTH + 1))
    truth[::3] = generator.standard_normal(truth[::3].shape)
    return x, x @ (STARTS[toward] + truth).ravel()


def least_squares(x, y, w):
    return x.T @ (x @ w - y) / len(y)


def logistic(x, y, w):
    labels = np.sign(y)
    return -(x.T @ (labels / (1 + np.exp(labels * (x @ w))))) / len(y)


# Gradient, bound of the curvature, group_lasso.
PROBLEMS = {"quadratic": (least_squares, 1.0, 0.2), "logistic": (logistic, 0.25, 0.07)}


def prox(w, step, l1, lasso):
    """Of l1 and the group lasso, from their definitions; groups are rows."""
    w = np.sign(w) * np.maximum(np.abs(w) - step * l1, 0)
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    return w * np.maximum(1 - step * lasso * WEIGHTS[:, None] / np.maximum(norms, 1e-300), 0)


@functools.cache
def solved(problem, l1, toward):
    """The minimiser's distance from the start, in float64 by an accelerated method with restarts.

    To the last digits: in u = w - start the penalties are those towards zero.
    """
    gradient, curvature, lasso = PROBLEMS[problem]
    x, y = data(toward)
    start = STARTS[toward]
    largest = np.linalg.eigvalsh(x.T @ x).max() / len(y) * curvature
    step = 1 / (largest + WEIGHT_DECAY)
    w = ahead = np.zeros((GROUPS, WIDTH + 1))
    t = 1.0
    for _ in range(1500):
        slope = gradient(x, y, (start + ahead).ravel()).reshape(w.shape) + WEIGHT_DECAY * ahead
        new = prox(ahead - step * slope, step, l1, lasso)
        if ((ahead - new) * (new - w)).sum() > 0:  # O'Donoghue and Candes, 2015
            t = 1.0
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        ahead = new + (t - 1) / t_new * (new - w)
        w, t = new, t_new
    return w, largest


def trained(gradient, x, y, lr, l1, l2_mode, options, fused, toward, lasso):
    start = torch.from_numpy(STARTS[toward])
    matrix = nn.Parameter(start[:, :WIDTH].clone(memory_format=torch.contiguous_format))
    vector = nn.Parameter(start[:, WIDTH].clone())
    optimizer = ProxSGD(
        [
            {"params": [matrix], "rows": [7], "row_weights": [WEIGHTS.tolist()]},
            {"params": [vector], "rows": [7]},
        ],
        lr=lr,
        group_lasso=lasso,
        l1=l1,
        weight_decay=WEIGHT_DECAY,
        l2_mode=l2_mode,
        fused=fused,
        toward=toward,
        **options,
    )
    for _ in range(700):
        w = torch.cat([matrix.detach(), vector.detach()[:, None]], 1).numpy()
        slope = torch.from_numpy(gradient(x, y, w.ravel()).reshape(w.shape))
        matrix.grad, vector.grad = slope[:, :WIDTH].contiguous(), slope[:, WIDTH].contiguous()
        optimizer.step()
    return torch.cat([matrix.detach(), vector.detach()[:, None]], 1).numpy()


# A logistic step costs more, and knows no more of momentum.
CASES = [("quadratic", trajectory, toward) for trajectory in TRAJECTORIES for toward in STARTS]
CASES += [("logistic", "momentum", "zero"), ("logistic", "nesterov", "start")]


@pytest.mark.parametrize(("problem", "trajectory", "toward"), CASES)
@pytest.mark.parametrize("l2_mode", ["coupled", "proximal"])
@pytest.mark.parametrize("l1", [0.0, 0.02], ids=["groups", "sparse groups"])
def test_minimiser(problem, trajectory, toward, l2_mode, l1):
    expected, largest = solved(problem, l1, toward)
    start = STARTS[toward]
    dead = (expected == 0).all(1)
    assert 2 < dead.sum() < GROUPS - 2
    if l1:
        assert (expected[~dead] == 0).any()
    options = TRAJECTORIES[trajectory]
    lr = 1 / largest / gain(options)
    gradient, _, lasso = PROBLEMS[problem]
    how = (gradient, *data(toward), lr, l1, l2_mode, options, problem == "quadratic", toward)
    w = trained(*how, lasso)
    assert np.array_equal((w == start).all(1), dead)
    assert np.array_equal(w == start, expected == 0)
    assert np.abs(w - start - expected).max() < 1e-8  # convergence in float64
    if trajectory == "momentum" and problem == "quadratic":
        # A threshold of lr * group_lasso would settle elsewhere.
        assert np.abs(trained(*how, lasso / gain(options)) - start - expected).max() > 1e-3
