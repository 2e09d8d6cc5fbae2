"""Which channels of a classifier go, chosen by its training images, and what follows from that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from ..structure import Channels, Compacted, channels, importance, remove
from ..structure.channel_sets import smallest_multiple
from .files import RecipeError
from .loaders import EpochBatches, ImageDataset
from .model import Classifier
from .settings import Run
from .splits import Split

# Convolutions with odd numbers of channels are slower in inference libraries.
MULTIPLE_OF = 8
# Of each set of coupled channels so many stay at least.
MIN_KEEP = 0.1
RANKED_BATCHES = 10  # at most: channels are ranked by them
_SIDE = 32  # of the example image: which channels are coupled doesn't depend on it


def example_image(classifier: Classifier, side: int = _SIDE) -> Tensor:
    """An image (1, 3, side, side) of zeros, in the model's dtype and on its device."""
    weight = classifier.model.get_parameter("conv1.weight")
    return torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)


def find_channels(classifier: Classifier, side: int = _SIDE) -> Channels:
    """The model's sets of coupled channels.

    Raises:
        RecipeError: torch-pruning isn't installed.
    """
    try:
        return channels(classifier.model, example_image(classifier, side))
    except ImportError as error:
        raise RecipeError(
            "taking channels out needs torch-pruning: pip install 'resnet_reg_ext[compact]' "
            f"({error})"
        ) from None


def batches_of(split: Split, run: Run, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that a run trains on in an epoch, without augmentation."""
    batches = EpochBatches(len(split), min(run.batch_size, len(split)), run.seed)
    batches.set_epoch(epoch)
    dataset = ImageDataset(split, run.image_size)
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=run.workers))


def scores_of(
    classifier: Classifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    sets: Channels,
    method: str = "taylor",
) -> dict[str, Tensor]:
    """How much each channel matters, by the set's name.

    Raises:
        RecipeError: the loss is not finite.
    """
    dtype = classifier.model.get_parameter("conv1.weight").dtype
    converted = ((images.to(dtype), labels) for images, labels in batches)
    scores = importance(classifier.model, converted, method=method, sets=sets)
    if not all(bool(of_set.isfinite().all()) for of_set in scores.values()):
        raise RecipeError(
            "channels can't be ranked: the loss is not finite, training has diverged; try a lower "
            "--lr"
        )
    return scores


def check_share(option: str, share: float, sets: Channels, multiple_of: int) -> None:
    """Refuses to take out more than a tenth of each set, in multiples, lets go.

    Raises:
        RecipeError: says how much can go.
    """
    least = sum(smallest_multiple(math.ceil(MIN_KEEP * one.size), one, multiple_of) for one in sets)
    most = math.floor(1000 * (1 - least / sets.total)) / 1000
    if share > most:
        raise RecipeError(
            f"{option} {share:g} is more than can go: at least a tenth of each set of channels "
            f"stays, in multiples of {multiple_of}; must be at most {most:g}"
        )


def take_out(
    classifier: Classifier,
    sets: Channels,
    scores: Mapping[str, Tensor],
    left: int,
    sizes: Mapping[str, int],
    *,
    optimizer: Optimizer | None = None,
    multiple_of: int = MULTIPLE_OF,
) -> Compacted:
    """Takes the least important channels out so that ``left`` stay, or a few less.

    Args:
        classifier: isn't changed.
        sets: its sets.
        scores: by the set's name.
        left: how many channels of all sets may stay.
        sizes: how many channels each set had at first; a tenth of that stays.
        optimizer: goes along.
        multiple_of: the layers' numbers of channels are multiples of it.
    """
    guarded = {}
    ceiling = 1 + max(float(of_set.abs().max()) for of_set in scores.values())
    for one in sets:
        of_set = scores[one.name].clone()
        keep = min(one.size, math.ceil(MIN_KEEP * sizes[one.name]))
        # Whatever else there is goes before the last tenth of a set.
        of_set[torch.argsort(of_set, descending=True)[:keep]] += ceiling
        guarded[one.name] = of_set
    return remove(
        classifier.model,
        None,
        share=_count_to_ask_for(guarded, sets, left, multiple_of) / sets.total,
        importance=guarded,
        optimizer=optimizer,
        min_keep=0.0,
        multiple_of=multiple_of,
        sets=sets,
    )


def _count_to_ask_for(
    scores: Mapping[str, Tensor], sets: Channels, left: int, multiple_of: int
) -> int:
    """How many of the least important channels must go so that ``left`` stay, or fewer.

    Rounding up to multiples keeps some of those that were to go.
    """
    ranked = sorted(
        (score, s, i)
        for s, one in enumerate(sets)
        for i, score in enumerate(scores[one.name].tolist())
    )
    counts = [one.size for one in sets]
    stay = [one.size for one in sets]
    for asked, (_, s, _i) in enumerate(ranked):
        if sum(stay) <= left:
            return asked
        counts[s] -= 1
        stay[s] = smallest_multiple(counts[s], sets[s], multiple_of)
    return sets.total - len(sets)


@torch.no_grad()
def refresh_statistics(classifier: Classifier, split: Split, run: Run) -> None:
    """Measures the norms' running statistics anew, over the training images without augmentation.

    Precise batch norm (``torch.optim.swa_utils.update_bn``).
    """
    weight = classifier.model.get_parameter("conv1.weight")
    update_bn((images.to(weight) for images, _ in batches_of(split, run)), classifier.model)
