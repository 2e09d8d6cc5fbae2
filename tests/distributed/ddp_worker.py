"""One of two processes of ``test_ddp.py``: torchrun ddp_worker.py FOLDER.

Trains in every way that the test compares and leaves the weights and states in FOLDER, by process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from resnet_reg_ext import ProxSGD, TargetSparsity, param_groups

WORLD = 2
STEPS = 6
PER_PROCESS = 4
SGD_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
OPTIONS = {**SGD_OPTIONS, "l1": 2e-2}


def launch(script: Path, *arguments: str) -> str:
    """Runs a script in two processes, in its own folder, and returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={WORLD}", script.name, *arguments]
    launcher = subprocess.Popen(
        command,
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = launcher.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGTERM)  # torchrun then ends its two
        output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    return output


def net() -> nn.Module:
    """Without batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 5)
    )


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(PER_PROCESS, 3, 7, 7, generator=generator)
    return images, torch.randint(5, (PER_PROCESS,), generator=generator)


def train(make_optimizer, rank: int, controller=None):
    model = net()
    wrapped = DistributedDataParallel(model)
    optimizer = make_optimizer(model)
    steered = controller(optimizer) if controller else None
    for step in range(STEPS):
        images, labels = batch(step, rank)
        optimizer.zero_grad()
        cross_entropy(wrapped(images), labels).backward()
        optimizer.step()
        if steered is not None:
            steered.step()
    return model, optimizer


def accumulate(rank: int):
    """Two batches of each process to a step, gradients exchanged at the second."""
    model = net()
    wrapped = DistributedDataParallel(model)
    optimizer = ProxSGD(param_groups(model, l1=2e-2, weight_decay=1e-2), lr=0.1)
    for step in range(0, STEPS, 2):
        optimizer.zero_grad()
        images, labels = batch(step, rank)
        with wrapped.no_sync():
            cross_entropy(wrapped(images), labels).backward()
        images, labels = batch(step + 1, rank)
        cross_entropy(wrapped(images), labels).backward()
        optimizer.step()
    return model, optimizer


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)  # as in the process that this is compared with
    rank = dist.get_rank()
    results = {}
    for name, make in {
        "ddp": lambda m: ProxSGD(m.parameters(), **OPTIONS),
        "ddp, l1=0": lambda m: ProxSGD(m.parameters(), **SGD_OPTIONS, l1=0.0),
    }.items():
        model, optimizer = train(make, rank)
        results[name] = (model.state_dict(), optimizer.state_dict())
    model, optimizer = train(
        lambda m: ZeroRedundancyOptimizer(m.parameters(), optimizer_class=ProxSGD, **OPTIONS), rank
    )
    held = sum(buffer.numel() for s in optimizer.optim.state.values() for buffer in s.values())
    optimizer.consolidate_state_dict(to=0)
    state = optimizer.state_dict() if rank == 0 else None
    results["zero"] = (model.state_dict(), state, held)
    model, optimizer = accumulate(rank)
    results["accumulated"] = (model.state_dict(), optimizer.state_dict())
    model, optimizer = train(
        lambda m: ProxSGD(m.parameters(), **OPTIONS),
        rank,
        lambda optimizer: TargetSparsity(optimizer, 0.5, steps=100),
    )
    results["steered"] = (model.state_dict(), optimizer.state_dict())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
