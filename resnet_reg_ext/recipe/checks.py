"""Runs that can't be made are refused here, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .checkpoints import Checkpoint
from .files import RecipeError
from .processes import count_processes, launch, with_processes
from .removal import check_removal
from .settings import LARGEST_SEED, OPTIONS_FILES, Run, check_run, with_absolute_paths
from .splits import Images

LAYER4_STRIDE = 32  # so many pixels of the image are one in a ResNet-50's last stage


def settled(run: Run, before: Checkpoint | None = None) -> Run:
    """The run as it is made and recorded: absolute paths, torchrun's number of processes.

    Args:
        run: the settings.
        before: the checkpoint that is resumed from.

    Raises:
        RecipeError: a setting is impossible, or the machine can't do it.
    """
    check_run(run)
    if before is not None and before.source is not None and not Path(run.data).is_absolute():
        run = replace(run, data=before.source.folder)  # run.yaml of 0.1.0 has it as it was typed
    run = with_absolute_paths(with_processes(run))
    _check_machine(run)
    check_removal(run)
    return run


def _check_machine(run: Run) -> None:
    processes = count_processes(run)
    if run.batch_size % processes:
        raise RecipeError(
            f"--batch-size {run.batch_size} can't be shared evenly by {processes} processes"
        )
    one_value = run.image_size <= LAYER4_STRIDE and run.freeze != "layer4"
    if run.batch_size // processes < 2 and one_value:
        raise RecipeError(
            f"--batch-size {run.batch_size} leaves one image to each of {processes} processes, and "
            f"--image-size {run.image_size} one pixel of it to the last batch norms, which need "
            f"two: give at least {2 * processes} images or {LAYER4_STRIDE + 1} pixels"
        )
    gpus = torch.cuda.device_count()
    on_gpus = run.accelerator == "gpu" or (run.accelerator == "auto" and gpus > 0)
    here = launch().local_world_size or run.devices
    if on_gpus and gpus < here:
        raise RecipeError(f"--accelerator {run.accelerator}: {here} wanted, torch finds {gpus}")
    if run.precision == "16-mixed" and not on_gpus:
        # Lightning would train in bfloat16 instead, and run.yaml say float16.
        raise RecipeError("--precision 16-mixed needs a GPU: give bf16-mixed on a CPU")


def check_images(run: Run, images: Images) -> None:
    """Refuses fewer images than processes: each has to measure one at least."""
    processes = count_processes(run)
    sets = (("training", images.train), ("validation", images.validation), ("test", images.test))
    for what, split in sets:
        if split is not None and len(split) < processes:
            raise RecipeError(
                f"--devices {processes}: {processes} processes need a {what} image each, and have "
                f"{len(split)}"
            )


def check_resumable(before: Checkpoint, last: Path, images: Images) -> None:
    """Refuses a checkpoint without the optimizer's state, or of other classes or images."""
    if before.is_former:
        raise RecipeError(
            f"{last} is of an earlier version, whose validation images were called test: its "
            f"weights can be evaluated, but to train on begin anew: --config "
            f"{last.parent / OPTIONS_FILES['train']}"
        )
    if not before.is_resumable:
        raise RecipeError(f"{last} holds the weights of a finished run: nothing to resume")
    if before.classes != images.classes:
        raise RecipeError(
            f"{last} has the classes {', '.join(before.classes)}, but the data "
            f"{', '.join(images.classes)}"
        )
    if before.source and images.source and before.source.digest != images.source.digest:
        raise RecipeError(
            f"--data {images.source.folder} is not what {last} was trained on: images have come, "
            "gone or changed; put them back, or train anew with another --out"
        )


def check_seeds(run: Run, seeds: int) -> None:
    """Refuses seeds from ``run.seed`` on that go beyond the largest."""
    if run.seed + seeds - 1 > LARGEST_SEED:
        raise RecipeError(
            f"--seed {run.seed} --seeds {seeds}: the last seed would be {run.seed + seeds - 1}; "
            f"the largest is {LARGEST_SEED}"
        )
