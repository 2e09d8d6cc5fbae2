"""Batches for Lightning, whose order and augmentation depend on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from .images import load_image
from .settings import Run
from .splits import Images, Split

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PRIME = 1_000_003
# Sides of a larger ratio make an image thin; any other costs at most 64 * size**2 pixels.
_THIN, _KEPT = 64, 8


def transform(image_size: int, augment: str) -> Callable[[Any], Tensor]:
    """Makes float32 (3, size, size) of a PIL image or a uint8 tensor, normalised as ImageNet's."""
    whole = [
        partial(cut_thin, size=image_size),
        v2.Resize(image_size, antialias=True),
        v2.CenterCrop(image_size),
    ]
    crop_and_flip = [
        v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    geometry = {
        "none": whole,
        "shift": [*whole, v2.RandomCrop(image_size, image_size // 8, padding_mode="edge")],
        "flip": [*whole, v2.RandomHorizontalFlip()],
        "standard": crop_and_flip,
        "trivial": [*crop_and_flip, v2.TrivialAugmentWide()],
    }[augment]
    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    steps: Callable[[Any], Tensor] = v2.Compose([v2.ToImage(), *geometry, *scale])
    return steps


def cut_thin(image: Tensor, size: int) -> Tensor:
    """Cuts the middle out of a long thin image, which a resize to ``size`` would blow up.

    Resized by its shorter side, 1 x 10,000 pixels would become 224 x 2,240,000, of which the crop
    that follows keeps 224 x 224.

    Args:
        image: (channels, height, width).
        size: the length of the shorter side after the resize.
    """
    height, width = image.shape[-2:]
    short, long = sorted((height, width))
    if short >= size or long <= _THIN * short:
        return image
    # A multiple of the shorter side is resized by the same factor; the parity of the longer side
    # keeps the middle where it is.
    kept = _KEPT * short
    kept += (long - kept) % 2 * (short if short % 2 else 1)
    first = (long - kept) // 2
    return image.narrow(-1 if width == long else -2, first, kept)


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Transformed images and labels, by (row, draw); ``draw`` seeds the augmentation."""

    def __init__(self, split: Split, image_size: int, augment: str = "none") -> None:
        self.split = split
        self.random = augment != "none"
        self.transform = transform(image_size, augment)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        row, draw = key
        label = int(self.split.labels[row])
        image = self.split.images[row]
        pixels = load_image(image) if isinstance(image, Path) else image
        if not self.random:
            return self.transform(pixels), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw)
            return self.transform(pixels), label


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (row, draw) whose order depends on the seed and the epoch alone.

    A run that is interrupted anywhere can therefore be resumed without saving any random state.
    Processes share each batch evenly: two processes see together what one would see.

    Args:
        count: the number of images.
        batch_size: images in a batch, all processes together.
        seed: decides the order and the draws.
        step: the batch to begin with, counted from the start of the first epoch.
        rank: the number of this process.
        world_size: the number of processes.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        # A last batch that is not full is left out: batch norm needs more than a few images.
        self.epoch, self.start = divmod(step, count // batch_size)

    def __len__(self) -> int:
        return self.count // self.batch_size

    @property
    def sampler(self) -> EpochBatches:
        """Itself: Lightning calls ``set_epoch`` on the ``sampler`` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # torch.Generator uses 32 bits of a seed; the prime keeps the epochs of two seeds apart.
        seed = (_PRIME * self.seed + self.epoch) % 2**32
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(self.count, generator=generator).tolist()
        draws = torch.randint(2**62, (self.count,), generator=generator).tolist()
        keys = list(zip(rows, draws, strict=True))
        for batch in range(self.start, len(self)):
            first = batch * self.batch_size
            yield keys[first : first + self.batch_size][self.rank :: self.world_size]


class ImageData(pl.LightningDataModule):
    """Lightning's data module. Its state is the step from which training continues."""

    def __init__(self, images: Images, run: Run) -> None:
        super().__init__()
        self.images, self.run = images, run
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint's step."""
        self.step = state_dict["step"]

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, shuffled."""
        assert self.trainer is not None
        batches = EpochBatches(
            len(self.images.train),
            self.run.batch_size,
            self.run.seed,
            step=self.step,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        dataset = ImageDataset(self.images.train, self.run.image_size, self.run.augment)
        return DataLoader(dataset, batch_sampler=batches, num_workers=self.run.workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Training images and then validation images, both without augmentation."""
        assert self.trainer is not None
        return [
            evaluation_loader(split, self.run, self.trainer.global_rank, self.trainer.world_size)
            for split in (self.images.train, self.images.validation)
        ]


def evaluation_loader(
    split: Split, run: Run, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """Batches in order, without augmentation; each image goes to one process."""
    keys = [(row, 0) for row in range(rank, len(split), world_size)]
    size = batch_size_for(run.image_size)
    batches = [keys[first : first + size] for first in range(0, len(keys), size)]
    dataset = ImageDataset(split, run.image_size)
    return DataLoader(dataset, batch_sampler=batches, num_workers=run.workers)


def batch_size_for(image_size: int) -> int:
    """Images a batch where nothing is learnt: they take at most some hundred MB."""
    return max(16, min(250, 1_000_000 // image_size**2))


def class_weights(run: Run, train: Split) -> Tensor | None:
    """What each class counts in the loss: scikit-learn's balanced weights, where asked for."""
    if run.class_weights == "none":
        return None
    labels = train.labels.numpy()
    weights = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    return torch.tensor(weights, dtype=torch.float32)
