"""Which callback takes channels out of a run's model, by --method."""

from __future__ import annotations

from .model import Classifier
from .removal import ChannelRemoval
from .settings import Run
from .splits import Split
from .steered_removal import SteeredRemoval

_METHODS: dict[str, type[ChannelRemoval]] = {"taylor": ChannelRemoval, "prox": SteeredRemoval}


def removal_of(
    run: Run, classifier: Classifier, split: Split, *, resumed: bool = False
) -> list[ChannelRemoval]:
    """The callback that takes channels out of a run's model; none where none are to go.

    Args:
        run: the settings.
        classifier: with the weights to begin with, or with a checkpoint's shapes.
        split: the training images.
        resumed: whether the checkpoint's channels may be gone in part.

    Raises:
        RecipeError: so many channels can't be taken out, or a package is missing.
    """
    if run.channels is None:
        return []
    removal = _METHODS[run.method](classifier, run, split)
    if not resumed:
        removal.check()
    return [removal]
