"""The installed package beside another build of it, step by step in turn.

pybind11 refuses a second compiled module that registers the same C++ types, so each copy has a
process of its own. The two take turns: one waits at a pipe while the other steps. Where tensors lie
in memory changes a time by some percent, so several pairs of processes are started. Each process
also steps torch's SGD(fused): its ratio between the processes, which should be 1, shows how far the
other ratios can be trusted.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from . import ROOT, suite
from .host import TENSORS
from .keys import OURS
from .measure import Samples
from .models import Shape, numel
from .progress import Progress

SGD = "sgd_fused"
COPIES = ("installed", "other")
PARTS = ("step", "host")


class CopyError(Exception):
    """A copy of the package can't be measured."""


@dataclass(frozen=True)
class Effort:
    """``pairs`` of processes, each with so many rounds."""

    pairs: int
    rounds: int


FULL = Effort(pairs=5, rounds=41)
QUICK = Effort(pairs=2, rounds=9)


class Copy:
    """A process that steps one copy of the package.

    Args:
        site: the folder that holds the copy; None for the installed one.
    """

    def __init__(self, site: Path | None) -> None:
        environment = dict(os.environ)
        if site is not None:
            paths = [str(site.resolve()), *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.name = "the installed copy" if site is None else f"the copy in {site}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.stepper"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Copy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()

    def send(self, request: dict[str, Any]) -> None:
        """Sends a request, whose answer ``receive`` waits for."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `receive` then tells how the process ended

    def receive(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            CopyError: the process failed, or ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CopyError(f"{self.name}: its process ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CopyError(f"{self.name}: {answer['error']}")
        return answer


def run(
    site: Path, sizes: Sequence[Shape], effort: Effort, device: str, progress: Progress
) -> dict[str, Any]:
    """Times steps of the installed package and of the copy in ``site``.

    Args:
        site: a folder with a package ``resnet_reg_ext``.
        sizes: the parameters' shapes.
        effort: how many processes and rounds.
        device: "cpu" or "cuda".
        progress: is told what begins.

    Raises:
        CopyError: there is no copy in ``site``, or a copy's weights aren't the reference's.
    """
    if not (site / "resnet_reg_ext" / "__init__.py").is_file():
        raise CopyError(
            f"--against {site}: there is no resnet_reg_ext in it; make it with pip install "
            "--no-deps --target SITE WHEEL"
        )
    shapes = {"step": [*sizes], "host": [(1,)] * TENSORS}
    request = {"device": device, "sizes": shapes, "rows": [OURS, SGD]}
    samples = Samples([f"{p}/{c}/{r}" for p in PARTS for c in COPIES for r in (OURS, SGD)])
    order = random.Random(0)
    for pair in range(effort.pairs):
        progress(f"processes {pair + 1} of {effort.pairs}, {effort.rounds} rounds")
        with Copy(None) as installed, Copy(site) as other:
            copies = dict(zip(COPIES, (installed, other), strict=True))
            for copy in copies.values():
                copy.send(request)
            descriptions = {name: copy.receive() for name, copy in copies.items()}
            _check_package(descriptions["other"]["package"], site)
            for _ in range(effort.rounds):
                _round(copies, samples, order)
    digests = [description.pop("digests") for description in descriptions.values()]
    return {
        "device": device,
        **suite.when_and_where(device),
        "tensors": len(sizes),
        "elements": numel(sizes),
        "pairs": effort.pairs,
        "rounds": effort.rounds,
        "copies": descriptions,
        "same_bits": digests[0] == digests[1],
        "times": {
            "step_ms": {key: samples.time(f"step/{key}") for key in _columns()},
            "host_us": {key: samples.time(f"host/{key}", 1e-6) for key in _columns()},
        },
        "ratios": {part: _ratios(samples, part) for part in PARTS},
    }


def _columns() -> list[str]:
    return [f"{copy}/{row}" for row in (OURS, SGD) for copy in COPIES]


def _check_package(package: str, site: Path) -> None:
    if Path(package).parent != site.resolve():
        raise CopyError(f"--against {site}: {package} was imported instead of the copy in it")


def _round(copies: dict[str, Copy], samples: Samples, order: random.Random) -> None:
    """Times each row of each copy once, one after another."""
    for part in PARTS:
        columns = _columns()
        for column in order.sample(columns, len(columns)):
            name, row = column.split("/")
            copies[name].send({"row": f"{part}/{row}"})
            seconds = copies[name].receive()["seconds"]
            samples.seconds[f"{part}/{column}"].append(seconds)


def _ratios(samples: Samples, part: str) -> dict[str, Any]:
    """Quantiles of the ratios within rounds."""

    def over(a: str, b: str) -> Any:
        return samples.ratio(f"{part}/{a}", f"{part}/{b}")

    return {
        "installed/other": over(f"installed/{OURS}", f"other/{OURS}"),
        "installed/sgd_fused": over(f"installed/{OURS}", f"installed/{SGD}"),
        "other/sgd_fused": over(f"other/{OURS}", f"other/{SGD}"),
        "control": over(f"installed/{SGD}", f"other/{SGD}"),
    }
