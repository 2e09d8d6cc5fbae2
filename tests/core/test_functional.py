"""The proximal maps and the step as functions."""

import math
import re

import hypothesis
import numpy as np
import pytest
import reference
import torch
from hypothesis import strategies as st
from reference import assert_same, values

from resnet_reg_ext.functional import elastic_net_prox, prox_sgd_, soft_threshold

pytestmark = pytest.mark.reads_tensors

SOME = [-3.0, -0.75, -0.5, -0.25, -0.0, 0.0, 0.25, 0.5, 0.75, 3.0]
FLOATS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_soft_threshold_values(dtype):
    x = torch.tensor(SOME, dtype=FLOATS[dtype])
    y = soft_threshold(x, 0.5)
    wanted = [-2.5, -0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 2.5]
    assert_same(y, torch.tensor(wanted, dtype=FLOATS[dtype]))  # +0 wherever it is zero
    assert y.dtype == x.dtype
    assert_same(x, torch.tensor(SOME, dtype=FLOATS[dtype]))


def test_soft_threshold_passes_infinity_and_nan():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    assert_same(soft_threshold(x, 0.5), x)


def test_soft_threshold_of_zero_is_the_identity_but_for_the_sign_of_zero():
    x = torch.tensor([1.0, -2.0, 0.0, 1e-45])
    assert_same(soft_threshold(x, 0.0), x)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 1)], ids=str)
def test_soft_threshold_shapes(shape):
    assert soft_threshold(torch.ones(shape), 0.25).shape == shape
    assert elastic_net_prox(torch.ones(shape), 0.25, 0.5).shape == shape


def test_elastic_net_prox_values():
    x = torch.tensor(SOME, dtype=torch.float64)
    # s = 1/2, l1 = 1, weight_decay = 2: shrink by 1/2, halve. All exact in binary.
    y = elastic_net_prox(x, 1.0, 2.0, 0.5)
    wanted = [-1.25, -0.125, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.125, 1.25]
    assert_same(y, torch.tensor(wanted, dtype=torch.float64))
    assert_same(elastic_net_prox(x, 0.5, 0.0), soft_threshold(x, 0.5))


@hypothesis.given(st.floats(-10, 10), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5))
def test_elastic_net_prox_is_the_minimiser(x, l1, weight_decay, step):
    """Against every other point nearby: (u - x)^2 / 2 + s (l1 |u| + weight_decay u^2 / 2)."""

    def objective(u):
        penalty = step * (l1 * np.abs(u) + weight_decay * u * u / 2)
        return (u - x) ** 2 / 2 + penalty

    u = elastic_net_prox(torch.tensor(x, dtype=torch.float64), l1, weight_decay, step).item()
    others = u + np.array([0, 1e-6, 1e-3, 0.1, 1, -1e-6, -1e-3, -0.1, -1])
    others = np.append(others, [0.0, x])
    # The objective is of size up to 500 and has an error of a few units in its last place.
    assert objective(u) <= objective(others).min() + 1e-12


@pytest.mark.parametrize(
    "function",
    [
        lambda x: soft_threshold(x, 0.3),
        lambda x: elastic_net_prox(x, 0.6, 0.7, 0.5),
    ],
    ids=["soft_threshold", "elastic_net_prox"],
)
def test_gradients(function):
    x = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(function, [x.requires_grad_()])


def test_gradient_at_and_around_the_kink():
    x = torch.tensor([-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75], requires_grad=True)
    soft_threshold(x, 0.5).sum().backward()
    # As the docstring has it: 1 where |x| > t and 0 elsewhere, the kink included.
    assert x.grad.tolist() == [1, 0, 0, 0, 0, 0, 1]


BAD = [
    (-0.1, "must be finite and not negative"),
    (math.nan, "must be finite and not negative"),
    (math.inf, "must be finite and not negative"),
    ("much", "must be a number"),
]


@pytest.mark.parametrize(("value", "words"), BAD, ids=lambda x: str(x))
def test_refusals(value, words):
    x = torch.ones(3)
    shown = re.escape(repr(value) if isinstance(value, str) else str(value))
    for name, call in (
        ("threshold", lambda: soft_threshold(x, value)),
        ("l1", lambda: elastic_net_prox(x, value, 0.1)),
        ("weight_decay", lambda: elastic_net_prox(x, 0.1, value)),
        ("step", lambda: elastic_net_prox(x, 0.1, 0.1, value)),
    ):
        with pytest.raises(ValueError, match=f"{name} is {shown}: {words}"):
            call()


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_prox_sgd_is_sgds_step_then_the_proximal_map(dtype, fused):
    generator = torch.Generator().manual_seed(0)
    p, g, m = (torch.randn(100, generator=generator).to(FLOATS[dtype]) for _ in range(3))
    options = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "l1": 0.5, "l2_mode": "proximal"}
    wanted = reference.step(values(p), values(g), values(m), dtype, **options)
    prox_sgd_([p], [g], [m], **options, fused=fused)
    assert_same(p, wanted[0])
    assert_same(m, wanted[1])


@pytest.mark.parametrize("fused", [None, True, False])
def test_prox_sgd_without_momentum_leaves_buffers(fused):
    p, m = torch.ones(3), torch.full((3,), 7.0)
    assert prox_sgd_([p], [torch.ones(3)], [m], lr=0.5, fused=fused) is None
    assert p.tolist() == [0.5, 0.5, 0.5]
    assert m.tolist() == [7.0, 7.0, 7.0]


@pytest.mark.parametrize("fused", [None, True, False])
def test_prox_sgd_at_the_first_step_only_writes_the_buffer(fused):
    p, m = torch.ones(3), torch.full((3,), math.nan)
    prox_sgd_(
        [p], [torch.ones(3)], [m], lr=0.5, momentum=0.9, dampening=0.5, first_step=True, fused=fused
    )
    assert p.tolist() == [0.5, 0.5, 0.5]
    assert m.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("fused", [None, True, False])
def test_prox_sgd_of_nothing(fused):
    prox_sgd_([], [], lr=0.1, fused=fused)
    prox_sgd_([], [], [], lr=0.1, momentum=0.9, fused=fused)


@pytest.mark.parametrize("fused", [None, True, False])
def test_prox_sgd_takes_any_sequence_and_leaves_it(fused):
    params, grads, momenta = (
        (torch.ones(2), torch.ones(3)),
        [torch.ones(2), torch.ones(3)],
        (torch.ones(2), torch.ones(3)),
    )
    prox_sgd_(params, grads, momenta, lr=0.5, momentum=0.5, fused=fused)
    assert params[0].tolist() == [0.25, 0.25]
    assert params[1].tolist() == [0.25, 0.25, 0.25]


@pytest.mark.parametrize("fused", [None, True, False])
def test_prox_sgd_on_leaves_that_require_gradients(fused):
    p = torch.ones(3, requires_grad=True)
    prox_sgd_([p], [torch.ones(3)], lr=0.5, fused=fused)
    assert p.tolist() == [0.5, 0.5, 0.5]
    assert p.is_leaf
    assert p.requires_grad


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_prox_sgd_leaves_gradient_mode_alone(grad_enabled, fused):
    with torch.set_grad_enabled(grad_enabled):
        prox_sgd_([torch.ones(3)], [torch.ones(3)], lr=0.5, fused=fused)
        assert torch.is_grad_enabled() == grad_enabled
