"""Takes channels out of a checkpoint: those that are zero, or those that matter least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..structure import Channels, Compacted, compact, remove
from .channel_choice import (
    MIN_KEEP,
    RANKED_BATCHES,
    batches_of,
    check_share,
    example_image,
    find_channels,
    refresh_statistics,
    scores_of,
    take_out,
)
from .checkpoints import save_checkpoint
from .data import load_split
from .files import RecipeError
from .model import Classifier, load_classifier
from .settings import DIGITS, expanded
from .splits import Split
from .train import be_quiet


def compact_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    share: float | None = None,
    macs: float | None = None,
    method: str = "taylor",
    multiple_of: int = 8,
    data: str | None = None,
    corrupt: str = "refuse",
) -> list[Path]:
    """Writes a checkpoint with fewer channels; prints what was taken out; returns the file.

    Without ``share`` and ``macs`` every channel that is exactly zero goes, and outputs stay the
    same. With one of them the least important channels go, and the norms' statistics are measured
    anew; to tune on: ``resnet-reg train --weights FILE``.

    Args:
        checkpoint: of a run.
        out: the new file.
        share: of the channels, at least, to take out.
        macs: of the multiply-adds, at least, to take out.
        method: "taylor" or "magnitude".
        multiple_of: keeps so many channels that the layers' numbers of them are multiples of it.
        data: images as of ``train``, whose training part ranks the channels; None takes those
            that the run was trained on.
        corrupt: "refuse" or "skip" unreadable images.

    Raises:
        RecipeError: something that the user can put right.
    """
    be_quiet()
    if out.exists() and out.samefile(checkpoint):
        raise RecipeError(f"--out {out} is the checkpoint itself: give another file")
    classifier = load_classifier(checkpoint)
    sets = find_channels(classifier, classifier.run.image_size)
    if share is None and macs is None:
        result = _without_zeros(classifier, sets, multiple_of)
        print(result.report)
        print(_largest_difference(classifier, result))
        classifier.model = result.model
    else:
        if share is not None:
            check_share("--share", share, sets, multiple_of)
        split = _images(classifier, data, corrupt)
        batches = islice(batches_of(split, classifier.run), RANKED_BATCHES)
        scores = scores_of(classifier, batches, sets, method)
        if share is not None:
            result = _without_share(classifier, sets, scores, share, multiple_of)
        else:
            assert macs is not None
            result = _without_multiply_adds(classifier, sets, scores, macs, multiple_of)
        print(result.report)
        classifier.model = result.model
        refresh_statistics(classifier, split, classifier.run)
        print("norms' statistics were measured anew; the weights aren't tuned yet")
    content: dict[str, Any] = {"state_dict": classifier.state_dict()}
    classifier.on_save_checkpoint(content)
    save_checkpoint(content, out)
    return [out]


def _without_zeros(classifier: Classifier, sets: Channels, multiple_of: int) -> Compacted:
    result = compact(classifier.model, None, multiple_of=multiple_of, sets=sets)
    before, after = result.report.channels
    if before == after and not result.report.shortcuts:
        zero = sum(result.report.kept_zero.values())
        more = f" ({zero} are, and stay as --multiple-of {multiple_of} asks)" if zero else ""
        raise RecipeError(
            f"none of the {before} channels that can be taken out is all zero{more}; those that "
            "matter least are taken out by --share or --macs"
        )
    return result


@torch.no_grad()
def _largest_difference(classifier: Classifier, result: Compacted) -> str:
    """How much the outputs have changed, on one image of noise."""
    image = torch.rand(
        example_image(classifier, classifier.run.image_size).shape,
        generator=torch.Generator().manual_seed(0),
    ).to(example_image(classifier))
    before, after = classifier.model(image), result.model.eval()(image)
    size = max(float(before.abs().max()), torch.finfo(before.dtype).tiny)
    return f"outputs differ by {float((after - before).abs().max()) / size:.1e} of their size"


def _images(classifier: Classifier, data: str | None, corrupt: str) -> Split:
    """The training images that rank the channels."""
    if data is not None and data != DIGITS:
        data = str(expanded(data))
    run = replace(classifier.run, corrupt=corrupt)
    split = load_split(run, "train", classifier.classes, data, classifier.source)
    if len(split) < 2:
        raise RecipeError(f"{len(split)} training images are too few to rank channels by")
    return split


def _without_share(
    classifier: Classifier,
    sets: Channels,
    scores: Mapping[str, Tensor],
    share: float,
    multiple_of: int,
) -> Compacted:
    sizes = {one.name: one.size for one in sets}
    left = sets.total - round(share * sets.total)
    return take_out(classifier, sets, scores, left, sizes, multiple_of=multiple_of)


def _without_multiply_adds(
    classifier: Classifier,
    sets: Channels,
    scores: Mapping[str, Tensor],
    macs: float,
    multiple_of: int,
) -> Compacted:
    """Asks for more until rounding up to multiples leaves no more than was asked for."""
    asked = macs
    while True:
        try:
            result = remove(
                classifier.model,
                None,
                macs=asked,
                importance=scores,
                min_keep=MIN_KEEP,
                multiple_of=multiple_of,
                sets=sets,
            )
        except ValueError:
            raise RecipeError(
                f"--macs {macs:g} is more than can go: at least a tenth of each set of channels "
                f"stays, in multiples of {multiple_of}"
            ) from None
        before, after = result.report.multiply_adds
        missing = after / before - (1 - macs)
        if missing <= 0:
            return result
        asked += max(missing / 2, 1e-3)
