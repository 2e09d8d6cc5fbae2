"""With toward="start" training settles at the minimiser of F, whose penalties are of w - start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from test_minimiser import TRAJECTORIES as WAYS
from test_minimiser import (
    gain,
    ill_conditioned,
    in_every_way,
    logistic,
    logistic_gradient,
    minimise,
    soft,
    solved_by_fista,
)


@in_every_way
@pytest.mark.parametrize("fused", [True, False])
def test_separable_quadratic_in_closed_form(trajectory, l2_mode, fused):
    """f = h (w - a)^2 / 2 elementwise: w = start + soft(h (a - start), l1) / (h + weight_decay)."""
    options = WAYS[trajectory]
    generator = torch.Generator().manual_seed(0)
    h = 0.5 + torch.rand(200, generator=generator, dtype=torch.float64)
    a, start = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(2))
    l1, weight_decay = 0.5, 0.2
    distance = soft((h * (a - start)).numpy(), l1) / (h.numpy() + weight_decay)
    w, _ = minimise(
        lambda w: h * (w - a),
        start,
        600,
        fused,
        lr=0.5 / gain(options),
        l1=l1,
        weight_decay=weight_decay,
        l2_mode=l2_mode,
        toward="start",
        **options,
    )
    at_start = (w == start).numpy()
    assert 30 < at_start.sum() < 170
    assert np.array_equal(at_start, distance == 0)
    # 600 steps shrink the error below 1e-12; float64 carries 16 digits.
    assert np.abs(w.numpy() - start.numpy() - distance).max() < 1e-10


@in_every_way
def test_logistic_regression(trajectory, l2_mode):
    """In the shifted weights u = w - start the loss is of the margins X u + X start."""
    options = WAYS[trajectory]
    x, labels = logistic()
    start = 0.3 * np.random.default_rng(5).standard_normal(25)
    l1, weight_decay = 0.03, 0.02
    largest = np.linalg.eigvalsh(x.T @ x).max() / 4 / len(labels)
    w, gradient = minimise(
        lambda w: torch.from_numpy(logistic_gradient(x, labels, w.numpy())),
        torch.from_numpy(start),
        2500,
        lr=1 / largest / gain(options),
        l1=l1,
        weight_decay=weight_decay,
        l2_mode=l2_mode,
        toward="start",
        **options,
    )
    # 0 lies in the subdifferential of F; the problem is strictly convex.
    away = w.numpy() - start
    slope = gradient.numpy() + weight_decay * away
    moved = away != 0
    assert np.abs(slope + l1 * np.sign(away))[moved].max() < 1e-8
    assert np.abs(slope)[~moved].max() <= l1 + 1e-8
    assert 2 < np.count_nonzero(~moved) < 23
    towards_zero = solved_by_fista(x, labels, l1, weight_decay)
    assert np.abs(towards_zero - w.numpy()).max() > 0.05  # another minimiser


@pytest.mark.parametrize("l2_mode", ["coupled", "proximal"])
def test_against_scikit_learns_lasso_on_shifted_data(l2_mode):
    """The lasso of y - X start in u = w - start."""
    x, y = ill_conditioned()
    start = 0.15 * np.random.default_rng(6).standard_normal(30)
    lasso = Lasso(alpha=0.2, fit_intercept=False, tol=1e-14, max_iter=10**6)
    theirs = lasso.fit(x, y - x @ start).coef_
    matrix, side = torch.tensor(x.T @ x / len(y)), torch.tensor(x.T @ y / len(y))
    w, _ = minimise(
        lambda w: matrix @ w - side,
        torch.from_numpy(start),
        2000,
        lr=0.1 / np.linalg.eigvalsh(matrix.numpy()).max(),
        momentum=0.9,
        l1=0.2,
        weight_decay=0.0,
        l2_mode=l2_mode,
        toward="start",
    )
    assert np.array_equal(w.numpy() == start, theirs == 0)
    assert 3 < np.count_nonzero(theirs == 0) < 27
    assert np.abs(w.numpy() - start - theirs).max() < 1e-6  # how far scikit-learn's solver goes
