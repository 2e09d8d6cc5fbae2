"""A curve of training in mixed precision, with infinities put into the gradients at known steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from reference import assert_same
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_reg_ext import ProxSGD

STEPS, BATCH = 40, 16
INFINITE = {0, 7, 8, 14, 15, 16, 23, 31, 39}  # the first and the last, and some in a row
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
L1 = 1e-3


@pytest.fixture(autouse=True)
def one_thread(runtime):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def batches():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(labels), (STEPS, BATCH), generator=generator)
    return [(images[r], labels[r]) for r in rows]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, 10)).to(dtype)


def mixed(make_optimizer, batches, dtype):
    """The model, its losses, and after every step the scale and the weights."""
    model = net()
    optimizer = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5)
    losses, scales, weights = [], [], []
    for step, (images, labels) in enumerate(batches):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        if step in INFINITE:
            model[2].weight.grad[3, 1, 0, 2] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        weights.append([p.detach().clone() for p in model.parameters()])
    return losses, scales, weights


def sgd(params):
    return torch.optim.SGD(params, **OPTIONS, foreach=False)


HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@HALF
def test_same_decisions_scales_and_weights_as_torchs_sgd_at_every_step(batches, dtype):
    """A scale is a power of two, so unscaling before the step or within it gives the same bits."""
    losses, scales, weights = mixed(sgd, batches, dtype)
    moved = [not all(map(torch.equal, a, b)) for a, b in pairwise(weights)]
    assert {n for n, yes in enumerate(moved, start=1) if not yes} == INFINITE - {0}
    assert all(map(torch.equal, weights[0], net().parameters()))
    assert scales[0] == 2.0**11
    assert scales[5] > scales[8] < scales[13]  # it falls, and grows again
    for options in ({}, {"fused": True}, {"fused": False, "capturable": True}):
        ours = mixed(lambda p, o=options: ProxSGD(p, **OPTIONS, l1=0.0, **o), batches, dtype)
        assert ours[0] == losses
        assert ours[1] == scales
        for step, (a, b) in enumerate(zip(ours[2], weights, strict=True)):
            for p, q in zip(a, b, strict=True):
                assert_same(p, q, f"{options}, step {step}")


def in_float64(batches, left_out):
    """The losses and the model of a training without a scaler."""
    model = net(torch.float64)
    optimizer = ProxSGD(model.parameters(), **OPTIONS, l1=L1, fused=False)
    losses = []
    for step, (images, labels) in enumerate(batches):
        optimizer.zero_grad()
        loss = cross_entropy(model(images.double()), labels)
        loss.backward()
        if step not in left_out:
            optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), model


@HALF
def test_the_curve_with_l1_is_that_of_float64_without_a_scaler(batches, dtype):
    losses, _, weights = mixed(lambda p: ProxSGD(p, **OPTIONS, l1=L1, fused=True), batches, dtype)
    # Layers round what comes in and goes out by up to half an eps of their dtype, or a quarter on
    # average. The bound is that average, at every step to the same side.
    tolerance = STEPS / 4 * torch.finfo(dtype).eps
    expected, model = in_float64(batches, INFINITE)
    torch.testing.assert_close(torch.tensor(losses), expected, rtol=tolerance, atol=0)
    every_step, _ = in_float64(batches, set())
    assert ((every_step - expected).abs() / expected).max() > tolerance
    zeros = sum(int((p == 0).sum()) for p in weights[-1])
    assert zeros == pytest.approx(sum(int((p == 0).sum()) for p in model.parameters()), rel=0.05)
    assert zeros > 50
