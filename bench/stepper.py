"""A process that steps one copy of the package on request; ``against`` starts it.

Lines of JSON go both ways. The first request names device and shapes; the reply describes the copy
and the checks of its rows. Each further request names a row; the reply is the seconds of a step.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

import resnet_reg_ext

from . import measure
from .baselines import BASELINES
from .measure import Step
from .models import Layout
from .tables import Inputs, prepare

# A shorter step is repeated within one timing.
LEAST_SECONDS = 5e-3


class Row:
    """A checked step, repeated to be long enough for a timing."""

    def __init__(self, key: str, inputs: Inputs, device: str) -> None:
        self._step, self.check = prepare(BASELINES[key], inputs)
        self._sync = measure.synchronise(device) or (lambda: None)
        self.digest = _digest(self._step)
        once = measure.seconds(self._step, 1, self._sync)
        self._repeats = max(1, round(LEAST_SECONDS / max(once, 1e-7)))

    def seconds(self) -> float:
        """Mean seconds of a step, after as many untimed steps.

        The untimed ones fill the caches, and give waiting threads of the other process, which spin
        for a moment, time to fall asleep.
        """
        measure.seconds(self._step, self._repeats, self._sync)
        return measure.seconds(self._step, self._repeats, self._sync)


def _digest(step: Step) -> str:
    """A digest of the bits of the weights that a step updates."""
    optimizer: torch.optim.Optimizer = step.__self__  # type: ignore[attr-defined]
    digest = hashlib.sha256()
    for parameter in optimizer.param_groups[0]["params"]:
        values = parameter.detach().cpu().contiguous()
        digest.update(ctypes.string_at(values.data_ptr(), values.nbytes))
    return digest.hexdigest()


def _prepare(request: dict[str, Any]) -> tuple[dict[str, Row], dict[str, Any]]:
    """The rows of each list of shapes, and their description."""
    device = request["device"]
    rows = {}
    for part, sizes in request["sizes"].items():
        inputs = Inputs([tuple(size) for size in sizes], Layout(device))
        for key in request["rows"]:
            rows[f"{part}/{key}"] = Row(key, inputs, device)
    description = {
        "version": resnet_reg_ext.__version__,
        "package": str(Path(resnet_reg_ext.__file__).resolve().parent),
        "threads": torch.get_num_threads(),
        "digests": {key: row.digest for key, row in rows.items()},
        "checks": {key: row.check for key, row in rows.items()},
    }
    return rows, description


def main() -> None:
    """Answers requests until standard input ends."""

    def reply(content: dict[str, Any]) -> None:
        print(json.dumps(content), flush=True)

    try:
        rows, description = _prepare(json.loads(sys.stdin.readline()))
    except Exception as error:
        reply({"error": f"{error}"})
        return
    reply(description)
    with measure.without_gc():
        for line in sys.stdin:
            reply({"seconds": rows[json.loads(line)["row"]].seconds()})


if __name__ == "__main__":
    main()
