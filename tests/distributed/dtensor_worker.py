"""One of two processes of ``test_dtensor.py``: torchrun dtensor_worker.py FOLDER.

Trains in every way that the test compares and leaves what came out in FOLDER, by process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ddp_worker import OPTIONS, STEPS, WORLD, batch, net
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy

from resnet_reg_ext import ProxSGD, TargetSparsity, sparsity

SAVED_AT = 3


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def outcome(model, optimizer):
    """Weights and state as one process would have them."""
    return {
        name: {
            "weight": whole(p.detach()),
            **{key: whole(value) for key, value in optimizer.state[p].items()},
        }
        for name, p in model.named_parameters()
    }


def sharded(dtype):
    """The same net divided between the processes; the last layer's 5 rows as 3 and 2."""
    model = net().to(dtype)
    fully_shard(model[0])
    fully_shard(model)
    return model


def train(model, optimizer, steps=range(STEPS), **in_step):
    dtype = next(model.parameters()).dtype
    for step in steps:
        images, labels = batch(step, dist.get_rank())
        optimizer.zero_grad()
        cross_entropy(model(images.to(dtype)), labels).backward()
        optimizer.step(**in_step)


def fsdp(dtype=torch.float32, **options):
    model = sharded(dtype)
    optimizer = ProxSGD(model.named_parameters(), **{**OPTIONS, "fused": True, **options})
    train(model, optimizer)
    counts = optimizer.sparsity().to_dict()
    assert sparsity(model).to_dict()["layers"] == counts["layers"]
    return outcome(model, optimizer), counts


def fsdp_towards_start():
    """Weights, state, and how many of the weights are at their start."""
    model = sharded(torch.float32)
    optimizer = ProxSGD(model.named_parameters(), **OPTIONS, toward="start", track_sparsity=True)
    train(model, optimizer)
    return outcome(model, optimizer), optimizer.sparsity().to_dict()


COUPLED = {"lr": 0.1, "momentum": 0.9, "l1": 2e-3, "weight_decay": 1e-2, "group_lasso": 0.12}


def coupled_groups(model):
    """Weights and biases in groups of their own, rows of each layer but the last coupled.

    Of 8 rows, each process has 4; the first set has a weight for each of its rows.
    """
    named = dict(model.named_parameters())
    of_rows = [0.0, 1.0, 3.0, 4.0, 1.0, 5.0, 2.0, 9.0]
    return [
        {
            "params": [named["0.weight"], named["2.weight"], named["4.weight"]],
            "rows": [0, 1, None],
            "row_weights": [of_rows, None, None],
        },
        {
            "params": [named["0.bias"], named["2.bias"], named["4.bias"]],
            "rows": [0, 1, None],
            "l1": 0.0,
            "weight_decay": 0.0,
        },
    ]


def coupled(fused, **options):
    """Whole channels, which FSDP2 never cuts."""
    model = sharded(torch.float32)
    optimizer = ProxSGD(coupled_groups(model), **COUPLED, fused=fused, **options)
    train(model, optimizer)
    return outcome(model, optimizer)


def steered(model, train):
    """An optimizer whose group lasso is steered to four tenths of the channels, and the state."""
    optimizer = ProxSGD(coupled_groups(model), **COUPLED)
    steering = TargetSparsity(optimizer, 0.4, steps=STEPS, of="channels")
    for step in range(STEPS):
        train(model, optimizer, [step])
        steering.step()
    return optimizer, steering.state_dict()


def steered_outcome():
    """The same with sharded rows, whose norms are gathered."""
    model = sharded(torch.float32)
    optimizer, state = steered(model, train)
    return outcome(model, optimizer), state


def uncoupled(mesh):
    """The words about a parameter that isn't divided by rows, or not as its set's others are."""
    words = []
    for first, second in ((Shard(1), Shard(0)), (Shard(0), Replicate()), (Shard(0), None)):
        params = [
            nn.Parameter(
                VALUES.clone() if p is None else distribute_tensor(VALUES.clone(), mesh, [p])
            )
            for p in (first, second)
        ]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = ProxSGD([{"params": params, "rows": [0, 0]}], **COUPLED)
        try:
            optimizer.step()
        except ValueError as error:
            words.append(str(error))
    return words


# Model and optimizer of the checkpoints: what is float32 beside bfloat16 must stay so.
SAVED = {
    "float32": (torch.float32, {}),
    "masters": (torch.bfloat16, {"master_weights": True}),
    "momentum": (torch.float32, {"momentum_dtype": torch.bfloat16}),
    "start": (torch.float32, {"toward": "start"}),
    "start, masters": (torch.bfloat16, {"toward": "start", "master_weights": True}),
}


def checkpoints(folder, kind):
    """Saves half-way; and goes on from half-way of one process."""
    dtype, options = SAVED[kind]
    model = sharded(dtype)
    optimizer = ProxSGD(model.parameters(), **OPTIONS, **options)
    train(model, optimizer, range(SAVED_AT))
    save(model, optimizer, folder / f"{kind}_of_two")

    model = sharded(dtype)
    optimizer = ProxSGD(model.parameters(), **OPTIONS, **options)
    load(model, optimizer, folder / f"{kind}_of_one")
    train(model, optimizer, range(SAVED_AT, STEPS))
    return outcome(model, optimizer)


def save(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer)
    dcp.save(
        {"model": weights, "optimizer": state},
        checkpoint_id=folder,
    )


def load(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )


VALUES = torch.linspace(-1, 1, 35).reshape(7, 5)
GRADS = torch.linspace(2, -3, 35).reshape(7, 5)


def placements(mesh):
    """Parameter and gradient divided in every pair of ways: 7 rows, 5 columns, 2 processes."""
    results = {}
    for of_param in (Shard(0), Shard(1), Replicate()):
        for of_grad in (Shard(0), Shard(1), Replicate(), Partial()):
            param = nn.Parameter(distribute_tensor(VALUES.clone(), mesh, [of_param]))
            optimizer = ProxSGD([param], **OPTIONS, fused=True, track_sparsity=True)
            for _ in range(2):
                if of_grad.is_partial():
                    part = GRADS * (0.25 if dist.get_rank() else 0.75)
                    param.grad = DTensor.from_local(part, mesh, [of_grad])
                else:
                    param.grad = distribute_tensor(GRADS, mesh, [of_grad])
                optimizer.step()
            assert param._version > 0
            results[str(of_param), str(of_grad)] = (
                param.detach().full_tensor(),
                optimizer.sparsity().zeros,
            )
    return results


def odd_ones(mesh):
    """A scalar, a tensor of which one process has nothing, and an ordinary one, in one group."""
    params = [
        nn.Parameter(distribute_tensor(torch.tensor(0.5), mesh, [Replicate()])),
        nn.Parameter(distribute_tensor(VALUES[:1].clone(), mesh, [Shard(0)])),
        nn.Parameter(VALUES.clone()),
    ]
    grads = [torch.tensor(2.0), GRADS[:1], GRADS]
    optimizer = ProxSGD(params, **OPTIONS, fused=True, track_sparsity=True)
    for _ in range(2):
        for p, g in zip(params, grads, strict=True):
            is_whole = not isinstance(p, DTensor)
            p.grad = g.clone() if is_whole else distribute_tensor(g.clone(), mesh, p.placements)
        optimizer.step()
    return [whole(p.detach()) for p in params], optimizer.sparsity().zeros


def refusals(mesh):
    """The words of each error, and whether the parameter was left alone."""

    def dtensor(placement):
        return distribute_tensor(VALUES.clone(), mesh, [placement])

    def attempt(param, grad, state=None):
        param = nn.Parameter(param)
        param.grad = grad
        optimizer = ProxSGD([("w", param)], **OPTIONS)
        if state is not None:
            optimizer.state[param]["momentum_buffer"] = state
        part = param.to_local() if isinstance(param, DTensor) else param.detach()
        before = part.clone()
        try:
            optimizer.step()
        except ValueError as error:
            return str(error), torch.equal(part, before)
        return "no error", False

    def load_into(of_state, into):
        """A checkpoint of one kind into an optimizer of the other."""
        optimizers = []
        for tensor in (of_state, into):
            param = nn.Parameter(tensor)
            param.grad = torch.ones_like(param)
            optimizers.append(ProxSGD([("w", param)], **OPTIONS))
            optimizers[-1].step()
        before = optimizers[1].state_dict()["state"][0]["momentum_buffer"]
        try:
            optimizers[1].load_state_dict(optimizers[0].state_dict())
        except ValueError as error:
            return str(error), optimizers[1].state_dict()["state"][0]["momentum_buffer"] is before
        return "no error", False

    partial = DTensor.from_local(VALUES.clone(), mesh, [Partial()])
    row, column = Shard(0), Shard(1)
    return {
        "partial": attempt(partial, torch.ones_like(partial)),
        "plain momentum": attempt(dtensor(row), dtensor(row), torch.zeros(7, 5)),
        "momentum elsewhere": attempt(dtensor(row), dtensor(row), dtensor(column)),
        "momentum divided": attempt(VALUES.clone(), GRADS.clone(), dtensor(row)),
        "plain checkpoint": load_into(VALUES.clone(), dtensor(row)),
        "divided checkpoint": load_into(dtensor(row), VALUES.clone()),
    }


def tensor_parallel(mesh):
    """A layer divided by columns and one by rows, biases among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(model, mesh, plan)
    optimizer = ProxSGD(model.named_parameters(), **OPTIONS, fused=True)
    for step in range(STEPS):
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        cross_entropy(model(inputs), torch.arange(8) % 5).backward()
        optimizer.step()
    return outcome(model, optimizer), optimizer.sparsity().zeros


def clipped():
    """By a coefficient that is a DTensor itself."""
    model = sharded(torch.float32)
    optimizer = ProxSGD(model.parameters(), **OPTIONS)
    for step in range(STEPS):
        images, labels = batch(step, dist.get_rank())
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step(grad_coefficient=(0.1 / (norm + 1e-6)).clamp(max=1.0))
    return outcome(model, optimizer)


def scaled(fused):
    """With a GradScaler; once a single process has an infinity."""
    model = sharded(torch.float32)
    optimizer = ProxSGD(model.parameters(), **OPTIONS, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for step in range(STEPS):
        images, labels = batch(step, dist.get_rank())
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(images), labels)).backward()
        if step == 2 and dist.get_rank() == 1:
            model[0].weight.grad._local_tensor.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return outcome(model, optimizer), scales


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)  # as in the process that this is compared with
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {
        "fsdp": fsdp(),
        "fsdp, tracked": fsdp(track_sparsity=True),
        "fsdp, pure": fsdp(fused=False),
        "fsdp, start": fsdp_towards_start(),
        "fsdp, master weights": fsdp(torch.bfloat16, master_weights=True),
        **{f"checkpoint of one, {kind}": checkpoints(folder, kind) for kind in SAVED},
        "placements": placements(mesh),
        "odd ones": odd_ones(mesh),
        "refusals": refusals(mesh),
        "tensor parallel": tensor_parallel(mesh),
        "coupled": coupled(True),
        "coupled, pure": coupled(False),
        "coupled, start": coupled(True, toward="start"),
        "steered": steered_outcome(),
        "uncoupled": uncoupled(mesh),
        "clipped": clipped(),
        "scaled": scaled(None),
        "scaled, fused": scaled(True),
    }
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
