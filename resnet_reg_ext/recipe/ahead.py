"""What several runs will take, told before the first one: time and memory, from a step here."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from .. import ProxSGD, param_groups
from .forecast import count_steps
from .model import Classifier
from .processes import count_processes
from .settings import Run
from .splits import Images

_FORWARD = 0.2  # of a step, for as many images; measured at 0.18 with 32 pixels and batches of 250


def time_step(classifier: Classifier) -> float:
    """Seconds that a step takes here, on noise; the first one, which warms up, isn't counted."""
    run, model, classes = classifier.run, classifier.model.train(), len(classifier.classes)
    groups = param_groups(model, l1=run.l1, weight_decay=run.weight_decay)
    optimizer = ProxSGD(groups, lr=run.lr, momentum=run.momentum)
    images = torch.rand(run.batch_size, 3, run.image_size, run.image_size)
    labels = torch.arange(run.batch_size) % classes
    seconds = 0.0
    for _ in range(2):
        begin = time.monotonic()
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds = time.monotonic() - begin
        if seconds > 5:  # of large images, where warming up is nothing beside it
            break
    return seconds


def cost(runs: Sequence[Run], images: Images, classifier: Classifier) -> str:
    """A sentence on what runs that differ in regularisation alone will take.

    Args:
        runs: one at least.
        images: the first run's.
        classifier: the first run's, of no use afterwards.
    """
    run = runs[0]
    steps = count_steps(run, len(images.train))
    what = f"{_count(len(runs), 'run')} of {_count(steps, 'step')}, one after the other"
    on_gpu = run.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu or count_processes(run) > 1 or run.precision != "32-true":
        return what
    step = time_step(classifier)
    measured = len(images.train) + len(images.validation)
    evaluations = _FORWARD * measured / run.batch_size * (run.epochs // run.evaluate_every)
    minutes = len(runs) * (steps + evaluations) * step / 60
    return (
        f"{what}: about {_count(max(1, round(minutes)), 'minute')} if nothing else runs here "
        f"(a step took {step:.2f} s), and {_peak_gigabytes():.1f} GB of memory"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _peak_gigabytes() -> float:
    """The most memory that this process has had: Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e9 / 1024)
