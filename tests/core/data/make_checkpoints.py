"""Writes checkpoints_0_1_0.pt: what version 0.1.0 saved after three steps, and where two more led.

With version 0.1.0 installed: python tests/core/data/make_checkpoints.py
"""

import copy
from pathlib import Path

import torch
from torch import nn

import resnet_reg_ext
from resnet_reg_ext import ProxSGD

CASES = {
    "plain": ({}, torch.float32),
    "nesterov, proximal": (
        {"nesterov": True, "l2_mode": "proximal", "weight_decay": 0.1},
        torch.float32,
    ),
    "no momentum": ({"momentum": 0.0}, torch.float32),
    "bfloat16 momentum": ({"momentum_dtype": torch.bfloat16}, torch.float32),
    "master weights": ({"master_weights": True}, torch.bfloat16),
    "float64": ({"dampening": 0.25}, torch.float64),
    "frozen": ({}, torch.float32),
}


def run(name):
    options, dtype = CASES[name]
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 3), (5,))
    ]
    named = list(zip(("w", "b"), params, strict=True))
    optimizer = ProxSGD(named, lr=0.1, l1=0.05, **options)
    grads = [
        [torch.randn(p.shape, generator=generator).to(dtype) for p in params] for _ in range(5)
    ]
    for number, of_step in enumerate(grads):
        if number == 3:
            if name == "frozen":
                optimizer.freeze_zeros()
            saved = {
                "params": [p.detach().clone() for p in params],
                "optimizer": copy.deepcopy(optimizer.state_dict()),
            }
        for p, grad in zip(params, of_step, strict=True):
            p.grad = grad
        optimizer.step()
    end = [p.detach().clone() for p in params]
    return {**saved, "options": options, "grads": grads[3:], "end": end}


if __name__ == "__main__":
    assert resnet_reg_ext.__version__ == "0.1.0"
    torch.save(
        {name: run(name) for name in CASES}, Path(__file__).with_name("checkpoints_0_1_0.pt")
    )
