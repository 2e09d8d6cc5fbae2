"""Training with group_lasso settles at the minimiser of F, whole groups exactly at 0 or start."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import MultiTaskLasso
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


def settled(gradient, params, lr, steps, fused, **options):
    """Trains on the full gradient of all parameters."""
    optimizer = ProxSGD(params, lr=lr / gain(options), weight_decay=0.0, fused=fused, **options)
    for _ in range(steps):
        gradient()
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("trajectory", ["plain", "momentum", "nesterov"])
def test_against_scikit_learns_multi_task_lasso(trajectory, fused):
    """Its objective: |Y - X W|^2 / 2n + alpha sum of |W_i| over the rows, one for each feature."""
    generator = np.random.default_rng(3)
    x = generator.standard_normal((120, 20))
    x[:, 4:] += 0.5 * x[:, :-4]
    truth = np.where(generator.random((20, 1)) < 0.4, generator.standard_normal((20, 6)), 0)
    y = x @ truth + 0.3 * generator.standard_normal((120, 6))
    alpha = 0.35
    theirs = MultiTaskLasso(alpha, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(x, y)
    expected = theirs.coef_.T
    dead = (expected == 0).all(1)
    assert 3 < dead.sum() < 17
    assert not (expected[~dead] == 0).any()

    w = nn.Parameter(torch.zeros(20, 6, dtype=torch.float64))
    matrix, side = torch.tensor(x.T @ x / len(y)), torch.tensor(x.T @ y / len(y))

    def gradient():
        w.grad = matrix @ w.detach() - side

    groups = [{"params": [w], "rows": [0], "row_weights": [1.0]}]
    lr = 1 / np.linalg.eigvalsh(matrix.numpy()).max()
    options = {"l1": 0.0, "group_lasso": alpha, **TRAJECTORIES[trajectory]}
    settled(gradient, groups, lr, 800, fused, **options)
    ours = w.detach().numpy()
    assert np.array_equal(ours == 0, expected == 0)
    assert np.abs(ours - expected).max() < 1e-6  # how far scikit-learn's own solver goes


@functools.cache
def of_skglm():
    """See data/make_sparse_group_lasso.py."""
    path = Path(__file__).parent / "data" / "sparse_group_lasso.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize(("problem", "l1"), [("groups", 0.0), ("sparse groups", 0.04)])
def test_against_skglm_on_groups_of_unequal_sizes(problem, l1):
    """Its objective: |y - X w|^2 / 2n + sum of weights_g |w_g| + l1 |w|_1."""
    data = of_skglm()
    x, y, expected = (np.array(v) for v in (data["x"], data["y"], data["solutions"][problem]))
    ends = np.cumsum(data["sizes"])
    parts = [slice(end - size, end) for size, end in zip(data["sizes"], ends, strict=True)]
    dead = [not expected[part].any() for part in parts]
    assert 1 < sum(dead) < len(dead) - 1
    alive = np.repeat(~np.array(dead), data["sizes"])
    assert bool((expected[alive] == 0).any()) == (l1 > 0)

    # A set with one row is one group.
    params = [nn.Parameter(torch.zeros(1, size, dtype=torch.float64)) for size in data["sizes"]]

    def gradient():
        w = torch.cat([p.detach()[0] for p in params]).numpy()
        slope = torch.from_numpy(x.T @ (x @ w - y) / len(y))
        for p, part in zip(params, parts, strict=True):
            p.grad = slope[part][None].clone()

    groups = [{"params": params, "rows": list(range(len(params))), "row_weights": data["weights"]}]
    lr = 1 / np.linalg.eigvalsh(x.T @ x / len(y)).max()
    options = {"l1": l1, "group_lasso": 1.0, "momentum": 0.9}
    settled(gradient, groups, lr, 1200, True, **options)
    ours = torch.cat([p.detach()[0] for p in params]).numpy()
    assert np.array_equal(ours == 0, expected == 0)
    assert np.abs(ours - expected).max() < 1e-6  # how far skglm's own solver goes
