"""Costs around a step: a whole training step, and the cold start of a process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from . import measure
from .baselines import BASELINES
from .keys import OURS
from .measure import Samples
from .plan import Plan
from .progress import Progress
from .steps import Problem


def run_training(plan: Plan, device: str, progress: Progress) -> list[dict[str, Any]]:
    """The optimizer's share of a whole ResNet-50 training step."""
    return [_training(*image, device, progress) for image in plan.images]


def _training(
    pixels: int, batch: int, rounds: int, device: str, progress: Progress
) -> dict[str, Any]:
    progress(f"a whole training step at {pixels} px, batch {batch}")
    result: dict[str, Any] = {"pixels": pixels, "batch": batch, "threads": torch.get_num_threads()}
    try:
        import torchvision
    except ImportError as error:
        return {**result, "missing": f"torchvision: {error}"}
    torch.manual_seed(0)
    model = torchvision.models.resnet50().to(device)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    forward_and_backward()
    # All optimizers step the same model in turn; the small learning rate keeps its weights finite.
    problem = Problem(list(model.parameters()), lr=1e-6)
    keys = (OURS, "sgd_fused", "softshrink", "foreach_threshold")
    steps = {key: BASELINES[key].make(problem) for key in keys}
    for step in steps.values():
        step()
    samples = _in_order({"forward_and_backward": forward_and_backward, **steps}, rounds, device)
    passes = samples.seconds["forward_and_backward"]
    result["forward_and_backward_ms"] = samples.time("forward_and_backward")
    result["rows"] = [
        {
            "key": key,
            "name": BASELINES[key].name,
            "ms": samples.time(key),
            "share": measure.quantiles(
                [s / (s + rest) for s, rest in zip(samples.seconds[key], passes, strict=True)]
            ),
        }
        for key in keys
    ]
    return result


def _in_order(parts: dict[str, Callable[[], object]], rounds: int, device: str) -> Samples:
    """Times parts in the same order in each round."""
    sync = measure.synchronise(device) or (lambda: None)
    samples = Samples(list(parts))
    for _ in range(rounds):
        for key, part in parts.items():
            samples.seconds[key].append(measure.seconds(part, 1, sync))
    return samples


COLD_START = """
import json, time
def timed(work):
    start = time.perf_counter(); result = work(); return time.perf_counter() - start, result
times = {}
times["import torch"], torch = timed(lambda: __import__("torch"))
times["import resnet_reg_ext"], package = timed(lambda: __import__("resnet_reg_ext"))
def parameters():
    made = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(161)]
    for p in made: p.grad = torch.ones_like(p)
    return made
torch.optim.SGD(parameters(), lr=0.1).step()
ours = package.ProxSGD(parameters(), fused=True)
fused = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
times["first step, ProxSGD"], _ = timed(ours.step)
times["first step, SGD(fused)"], _ = timed(fused.step)
print(json.dumps(times))
"""


def run_cold_start(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Times imports (torch, then the package) and first steps, in new processes."""
    if not plan.cold_starts:
        return {}
    progress("cold start")
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as elsewhere:
        # `python -c` imports from its working directory, which must not hold the source tree.
        for _ in range(plan.cold_starts + 1):
            out = subprocess.run(
                [sys.executable, "-c", COLD_START],
                cwd=elsewhere,
                check=True,
                capture_output=True,
                text=True,
            )
            runs.append(json.loads(out.stdout.strip().splitlines()[-1]))
    # The first run reads files from the disk.
    return {
        "processes": plan.cold_starts,
        "ms": {key: measure.quantiles([1e3 * r[key] for r in runs[1:]]) for key in runs[0]},
    }
