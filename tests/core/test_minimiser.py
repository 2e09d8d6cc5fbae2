"""Training settles at the minimiser of F(w) = f(w) + l1 |w|_1 + weight_decay/2 |w|^2."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso
from torch import nn

from resnet_reg_ext import ProxSGD

TRAJECTORIES = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "little momentum": {"momentum": 0.3},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
EVERY_WAY = [
    pytest.mark.parametrize("trajectory", TRAJECTORIES),
    pytest.mark.parametrize("l2_mode", ["coupled", "proximal"]),
]


def in_every_way(test):
    for mark in EVERY_WAY:
        test = mark(test)
    return test


def gain(options):
    momentum = options["momentum"]
    return (1 - options.get("dampening", 0.0)) / (1 - momentum)


def soft(x, t):
    return np.sign(x) * np.maximum(np.abs(x) - t, 0)


def minimise(gradient, start, steps, fused=None, **options):
    """Trains on the full gradient and returns the parameter and its last gradient."""
    w = nn.Parameter(start.clone())
    optimizer = ProxSGD([w], fused=fused, **options)
    for _ in range(steps):
        w.grad = gradient(w.detach())
        optimizer.step()
    return w.detach(), gradient(w.detach())


def assert_optimal(w, gradient, l1, weight_decay, tolerance):
    """0 lies in the subdifferential of F, up to the tolerance."""
    w, gradient = w.double().numpy(), gradient.double().numpy()
    slope = gradient + weight_decay * w
    away = np.where(w != 0, np.abs(slope + l1 * np.sign(w)), np.maximum(np.abs(slope) - l1, 0))
    assert away.max() <= tolerance


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("l2_mode", ["coupled", "proximal"])
def test_one_weight(trajectory, l2_mode, fused):
    """(w - 1)^2 / 2 with l1 = weight_decay = 0.1 has its minimum at 0.9 / 1.1 = 0.818.

    A threshold of lr * l1 under a momentum of 0.9 would settle at 0.99 / 1.1 = 0.90.
    """
    options = TRAJECTORIES[trajectory]
    w, _ = minimise(
        lambda w: w - 1,
        torch.zeros(1, dtype=torch.float64),
        600,
        fused,
        lr=0.3 / gain(options),
        l1=0.1,
        weight_decay=0.1,
        l2_mode=l2_mode,
        **options,
    )
    # 600 steps shrink the error below 1e-12; float64 carries 16 digits.
    assert w.item() == pytest.approx(0.9 / 1.1, abs=1e-10)


def test_one_weight_worked_by_hand():
    w, _ = minimise(lambda w: w - 1, torch.zeros(1), 800, lr=0.01, l1=0.1, weight_decay=0.1)
    assert round(w.item(), 3) == 0.818


@in_every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_separable_quadratic_in_closed_form(trajectory, l2_mode, dtype):
    """f = h (w - a)^2 / 2 elementwise: w = soft(h a, l1) / (h + weight_decay)."""
    options = TRAJECTORIES[trajectory]
    generator = torch.Generator().manual_seed(0)
    h = 0.5 + torch.rand(200, generator=generator, dtype=torch.float64)
    a = torch.randn(200, generator=generator, dtype=torch.float64)
    l1, weight_decay = 0.5, 0.2
    expected = soft((h * a).numpy(), l1) / (h.numpy() + weight_decay)
    h, a = h.to(dtype), a.to(dtype)
    w, gradient = minimise(
        lambda w: h * (w - a),
        torch.randn(200, generator=generator, dtype=torch.float64).to(dtype),
        600,
        lr=0.5 / gain(options),
        l1=l1,
        weight_decay=weight_decay,
        l2_mode=l2_mode,
        **options,
    )
    zeros = (w == 0).numpy()
    assert 40 < zeros.sum() < 160
    assert np.array_equal(zeros, expected == 0)
    assert not torch.signbit(w[w == 0]).any()
    # In float64 only convergence limits it.
    assert_optimal(w, gradient, l1, weight_decay, 1e-10 if dtype is torch.float64 else 1e-5)
    assert np.abs(w.double().numpy() - expected).max() < 1e-5


def ill_conditioned():
    """A least-squares problem with correlated columns: its matrix and its right side."""
    generator = np.random.default_rng(1)
    x = generator.standard_normal((120, 3)) @ generator.standard_normal((3, 30))
    x = x / 3 + generator.standard_normal((120, 30))
    truth = np.where(generator.random(30) < 0.3, generator.standard_normal(30), 0)
    y = x @ truth + 0.1 * generator.standard_normal(120)
    return x, y


@in_every_way
def test_against_scikit_learns_elastic_net(trajectory, l2_mode):
    """Its objective: |y - x w|^2 / 2n + alpha ratio |w|_1 + alpha (1 - ratio) |w|^2 / 2."""
    options = TRAJECTORIES[trajectory]
    x, y = ill_conditioned()
    alpha, ratio = 0.3, 0.7
    theirs = ElasticNet(alpha=alpha, l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=10**6)
    theirs = theirs.fit(x, y).coef_
    matrix, side = torch.tensor(x.T @ x / len(y)), torch.tensor(x.T @ y / len(y))
    largest = torch.linalg.eigvalsh(matrix).max().item()
    w, gradient = minimise(
        lambda w: matrix @ w - side,
        torch.zeros(30, dtype=torch.float64),
        3000,
        lr=1 / largest / gain(options),
        l1=alpha * ratio,
        weight_decay=alpha * (1 - ratio),
        l2_mode=l2_mode,
        **options,
    )
    assert_optimal(w, gradient, alpha * ratio, alpha * (1 - ratio), 1e-9)
    assert np.array_equal(w.numpy() == 0, theirs == 0)
    assert 3 < np.count_nonzero(theirs == 0) < 27
    assert np.abs(w.numpy() - theirs).max() < 1e-6  # how far scikit-learn's own solver goes


def test_against_scikit_learns_lasso():
    x, y = ill_conditioned()
    theirs = Lasso(alpha=0.2, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(x, y).coef_
    inputs, targets = torch.tensor(x), torch.tensor(y)
    model = nn.Linear(30, 1, bias=False, dtype=torch.float64)
    largest = np.linalg.eigvalsh(x.T @ x / len(y)).max()
    optimizer = ProxSGD(
        model.parameters(), lr=0.1 / largest, momentum=0.9, l1=0.2, weight_decay=0.0
    )
    for _ in range(2000):
        optimizer.zero_grad()
        (0.5 * (model(inputs)[:, 0] - targets).square().mean()).backward()
        optimizer.step()
    ours = model.weight.detach().numpy()[0]
    assert np.array_equal(ours == 0, theirs == 0)
    assert np.abs(ours - theirs).max() < 1e-6  # how far scikit-learn's own solver goes


def logistic():
    generator = np.random.default_rng(2)
    x = generator.standard_normal((150, 25))
    x[:, 5:] += 0.5 * x[:, :20]
    truth = np.where(generator.random(25) < 0.3, 2 * generator.standard_normal(25), 0)
    labels = np.where(generator.random(150) < 1 / (1 + np.exp(-x @ truth)), 1.0, -1.0)
    return x, labels


def logistic_gradient(x, labels, w):
    return -(x.T @ (labels / (1 + np.exp(labels * (x @ w))))) / len(labels)


def solved_by_fista(x, labels, l1, weight_decay):
    """The minimiser in float64 by an accelerated method with restarts, to the last digits."""
    rate = 1 / (np.linalg.eigvalsh(x.T @ x).max() / 4 / len(labels) + weight_decay)
    w = ahead = np.zeros(x.shape[1])
    t = 1.0
    for _ in range(5000):
        slope = logistic_gradient(x, labels, ahead) + weight_decay * ahead
        new = soft(ahead - rate * slope, rate * l1)
        if (ahead - new) @ (new - w) > 0:  # O'Donoghue and Candes, 2015
            t = 1.0
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        ahead = new + (t - 1) / t_new * (new - w)
        w, t = new, t_new
    return w


@in_every_way
def test_logistic_regression(trajectory, l2_mode):
    options = TRAJECTORIES[trajectory]
    x, labels = logistic()
    l1, weight_decay = 0.03, 0.02
    expected = solved_by_fista(x, labels, l1, weight_decay)
    slope = torch.tensor(logistic_gradient(x, labels, expected))
    assert_optimal(torch.tensor(expected), slope, l1, weight_decay, 1e-12)
    largest = np.linalg.eigvalsh(x.T @ x).max() / 4 / len(labels)
    w, gradient = minimise(
        lambda w: torch.from_numpy(logistic_gradient(x, labels, w.numpy())),
        torch.zeros(25, dtype=torch.float64),
        2500,
        lr=1 / largest / gain(options),
        l1=l1,
        weight_decay=weight_decay,
        l2_mode=l2_mode,
        **options,
    )
    assert_optimal(w, gradient, l1, weight_decay, 1e-8)
    assert np.array_equal(w.numpy() == 0, expected == 0)
    assert 3 < np.count_nonzero(expected == 0) < 22
    assert np.abs(w.numpy() - expected).max() < 1e-6


def test_logistic_regression_in_float32_through_autograd():
    x, labels = logistic()
    l1, weight_decay = 0.03, 0.02
    expected = solved_by_fista(x, labels, l1, weight_decay)
    inputs, signs = torch.tensor(x).float(), torch.tensor(labels).float()
    model = nn.Linear(25, 1, bias=False)
    optimizer = ProxSGD(
        model.parameters(), lr=0.1, momentum=0.9, l1=l1, weight_decay=weight_decay, fused=True
    )
    for _ in range(1500):
        optimizer.zero_grad()
        nn.functional.softplus(-signs * model(inputs)[:, 0]).mean().backward()
        optimizer.step()
    w = model.weight.detach()[0]
    slope = torch.tensor(logistic_gradient(x, labels, w.double().numpy()))
    assert_optimal(w, slope, l1, weight_decay, 1e-5)  # 1e-7 is reached in float32
    assert np.array_equal(w.numpy() == 0, expected == 0)


def test_maximising_a_concave_function():
    """maximize ascends f = -(w - a)^2 / 2 and still pays for l1: the same minimiser of -f + l1."""
    a = torch.linspace(-2, 2, 41, dtype=torch.float64)
    w, _ = minimise(
        lambda w: a - w, torch.zeros_like(a), 600, lr=0.05, l1=0.5, weight_decay=0.1, maximize=True
    )
    assert np.abs(w.numpy() - soft(a.numpy(), 0.5) / 1.1).max() < 1e-10  # convergence in float64


def test_groups_have_their_own_coefficients():
    a = torch.linspace(-2, 2, 41, dtype=torch.float64)
    params = [nn.Parameter(torch.zeros_like(a)) for _ in range(3)]
    coefficients = [(0.5, 0.0), (0.0, 0.5), (0.2, 0.3)]
    optimizer = ProxSGD(
        [
            {"params": [p], "l1": l1, "weight_decay": weight_decay}
            for p, (l1, weight_decay) in zip(params, coefficients, strict=True)
        ],
        lr=0.05,
    )
    for _ in range(800):
        for p in params:
            p.grad = p.detach() - a
        optimizer.step()
    for p, (l1, weight_decay) in zip(params, coefficients, strict=True):
        expected = soft(a.numpy(), l1) / (1 + weight_decay)
        # Convergence in float64.
        assert np.abs(p.detach().numpy() - expected).max() < 1e-10
