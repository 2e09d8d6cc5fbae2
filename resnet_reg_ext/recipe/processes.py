"""Which of several processes this one is, and how Lightning gets them.

``RANK`` and its like may be left over in the environment of a shell, a notebook or a batch job.
They count only where a launcher is seen to be at work: torchrun's store answers, or the parent
process is the run that started this one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from .settings import Run

_STARTED_BY = "RESNET_REG_STARTED_BY"  # the id of the process that starts the others
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "PMI_RANK")


@dataclass(frozen=True)
class Launch:
    """How this process was started."""

    by: str = ""
    """"torchrun", "run" (a run of this recipe that has started the other processes), or ""."""
    rank: int = 0
    local_rank: int = 0
    world_size: int | None = None
    """Of torchrun alone; else the run's ``devices``."""
    local_world_size: int | None = None


def launch() -> Launch:
    """How this process was started, as far as it can be verified."""
    if "TORCHELASTIC_RUN_ID" in os.environ and _store_answers(
        os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    ):
        rank, local_rank, world_size, local_world_size = (
            int(os.environ[name]) for name in _TORCHRUN[:4]
        )
        return Launch("torchrun", rank, local_rank, world_size, local_world_size)
    started_by = os.environ.get(_STARTED_BY)
    if started_by == str(os.getpid()):
        return Launch("run")
    rank = _number(os.environ, "LOCAL_RANK")
    # A process that Lightning starts is never the first; another child inherits the first's rank.
    if started_by == str(os.getppid()) and rank:
        return Launch("run", rank, rank)
    return Launch()


@cache
def _store_answers(address: str, port: str) -> bool:
    """Whether torchrun's agent listens, as it does as long as the processes that it started run."""
    if not all(name in os.environ and os.environ[name].isdigit() for name in _TORCHRUN):
        return False
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # process 0 will open the store: the others wait for it
    try:
        socket.create_connection((address, int(port)), timeout=10).close()
    except OSError:
        return False
    return True


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 0


def is_rank_zero() -> bool:
    """Whether this process is the one that prints and writes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return launch().rank == 0


def count_processes(run: Run) -> int:
    """How many processes train together."""
    return launch().world_size or run.devices


def with_processes(run: Run) -> Run:
    """The run as it will be made: torchrun has decided on its own how many processes there are."""
    started = launch()
    if started.by != "torchrun":
        return run
    return replace(run, devices=started.world_size or 1, strategy="ddp")


def ignored_ranks() -> str:
    """Says which variables of launchers are ignored, as no launcher started this process."""
    if launch().by:
        return ""
    others = {"WORLD_SIZE": 1, "SLURM_NTASKS": 1}
    found = [
        f"{name}={os.environ[name]}"
        for name in _OF_LAUNCHERS
        if _number(os.environ, name) > others.get(name, 0)
    ]
    if not found:
        return ""
    return f"{', '.join(found)} in the environment ignored: torchrun did not start this process"


class OneMachine(LightningEnvironment):
    """Lightning's environment for processes of one machine, without what the variables say."""

    def __init__(self, started: Launch) -> None:
        super().__init__()
        self.started = started
        self.set_global_rank(started.rank)

    @property
    def creates_processes_externally(self) -> bool:
        """Whether the other processes run already."""
        return self.started.by == "run"

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """A free port; the first process tells it to those that it starts."""
        if self._main_port == -1 and self.started.by == "run":
            self._main_port = int(os.environ["MASTER_PORT"])
        if self._main_port == -1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._main_port = probe.getsockname()[1]
            # Lightning asks when it starts the others. They stay for this process's next Trainer.
            os.environ[_STARTED_BY] = str(os.getpid())
        return self._main_port

    def local_rank(self) -> int:
        """As Lightning's launcher told, 0 in the first process."""
        return self.started.local_rank

    def node_rank(self) -> int:
        """There is one machine."""
        return 0

    def teardown(self) -> None:
        """Leaves the environment as it is."""


def trainer_processes(run: Run) -> tuple[dict[str, Any], ClusterEnvironment]:
    """The Trainer's arguments for its processes, and its environment."""
    started = launch()
    if started.by == "torchrun":
        assert started.world_size is not None
        assert started.local_world_size is not None
        nodes = started.world_size // started.local_world_size
        options = {"devices": started.local_world_size, "num_nodes": nodes, "strategy": "ddp"}
        return options, TorchElasticEnvironment()
    environment = OneMachine(started)
    # A single process never tells Lightning its rank, which was read from RANK at the import.
    rank_zero_only.rank = started.rank  # type: ignore[attr-defined]
    return {"devices": run.devices, "strategy": run.strategy}, environment
