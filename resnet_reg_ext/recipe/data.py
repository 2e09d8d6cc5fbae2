"""Images, splits and wrong labels; batches that depend on the seed and the epoch alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.transforms import v2

from .files import RecipeError
from .settings import DIGITS, Run

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# 1,797 images. Few are trained on, so that a ResNet-50 overfits within minutes.
DIGITS_TRAIN_SIZE, DIGITS_TEST_SIZE = 200, 500
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Images and labels of one split. ``images`` are paths, or uint8 tensors (3, h, w)."""

    images: Sequence[Path | Tensor]
    labels: Tensor
    """int64 (count,)"""
    wrong: int = 0
    """How many labels were made wrong on purpose."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Split:
        """Some of the images."""
        return Split([self.images[i] for i in rows], self.labels[list(rows)])


@dataclass(frozen=True)
class Images:
    """What a run trains and tests on."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()
    """What the user should know: images skipped, splits left unused."""


def load_images(run: Run) -> Images:
    """Reads, splits and, where the run says so, spoils labels. The seed decides all of it.

    Raises:
        RecipeError: the folder, an image or a size can't be used.
    """
    images = _digits(run) if run.data == DIGITS else _folder(run)
    train, test = images.train, images.test
    if run.data != DIGITS:  # the digits are split to size at once
        train = _subset(train, run.train_size, run.seed, "train_size")
        test = _subset(test, run.test_size, run.seed, "test_size")
    if len(train) < run.batch_size:
        raise RecipeError(
            f"--batch-size {run.batch_size} is more than the {len(train)} training images"
        )
    train = spoil_labels(train, run.label_noise, len(images.classes), run.seed)
    return replace(images, train=train, test=test)


def default_split(run: Run) -> str:
    """The split to evaluate on: test, unless there is a folder for val alone."""
    if run.data == DIGITS or run.val_fraction is not None:
        return "test"
    has_test, has_val = ((Path(run.data) / name).is_dir() for name in ("test", "val"))
    return "val" if has_val and not has_test else "test"


def load_split(run: Run, split: str, classes: Sequence[str]) -> Split:
    """One split, for evaluation; its labels are true.

    Args:
        run: where the images are, and which of them.
        split: "train", "val" or "test". The last two are one where the run splits the images; a
            folder that is not split is taken whole.
        classes: the class names that the model knows, in its order.

    Raises:
        RecipeError: the split isn't there or its classes are others.
    """
    if run.data != DIGITS and run.val_fraction is None:
        root = Path(run.data)
        if not root.is_dir():
            raise RecipeError(f"--data {root} is not a folder (nor {DIGITS!r})")
        if any((root / name).is_dir() for name in SPLITS):
            root = root / split
            if not root.is_dir():
                there = [name for name in SPLITS if (Path(run.data) / name).is_dir()]
                raise RecipeError(
                    f"--data {run.data} has no folder {split}; --split may be {' or '.join(there)}"
                )
        return _scan(root, run, classes)[0]
    images = load_images(replace(run, label_noise=0.0, batch_size=2))
    if images.classes != tuple(classes):
        raise RecipeError(_other_classes(run.data, images.classes, classes))
    return images.train if split == "train" else images.test


def spoil_labels(split: Split, share: float, classes: int, seed: int) -> Split:
    """Exchanges a share of the labels for another class each, drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    count = round(share * len(split))
    rows = torch.randperm(len(split), generator=generator)[:count]
    labels = split.labels.clone()
    # Adding 1 to classes - 1, modulo classes, always gives another class.
    labels[rows] += torch.randint(1, classes, (count,), generator=generator)
    return replace(split, labels=labels % classes, wrong=count)


def _digits(run: Run) -> Images:
    if run.val_fraction is not None:
        raise RecipeError("--val-fraction is for folders; digits take --train-size and --test-size")
    raw = load_digits()
    # Grey levels from 0 to 16; enlarged later, like any image.
    pixels = (torch.tensor(raw.images).unsqueeze(1) * (255 / 16)).to(torch.uint8)
    every = Split(list(pixels.expand(-1, 3, -1, -1)), torch.tensor(raw.target, dtype=torch.int64))
    train, test = _split(
        every,
        run.seed,
        train_size=DIGITS_TRAIN_SIZE if run.train_size is None else run.train_size,
        test_size=DIGITS_TEST_SIZE if run.test_size is None else run.test_size,
    )
    return Images(tuple(str(name) for name in raw.target_names), train, test)


def _folder(run: Run) -> Images:
    root = Path(run.data)
    if not root.is_dir():
        raise RecipeError(f"--data {root} is not a folder (nor {DIGITS!r})")
    if not (root / "train").is_dir():
        classes = _class_names(root)
        for name in classes:
            if name.lower() in _LIKE_SPLITS:
                raise RecipeError(
                    f"--data {root} has a folder {name}, which looks like a split and not like a "
                    "class: splits must be called train, val and test"
                )
        for name in classes:
            inside = [path for path in _folders(root / name) if any(_images_in(path))]
            if inside and not any(map(_is_image, (root / name).iterdir())):
                raise RecipeError(
                    f"--data {root} has no images in {name}, but in folders inside it: is "
                    f"{root / name} the folder of class folders?"
                )
        if run.val_fraction is None:
            raise RecipeError(
                f"--data {root} has no folder train: give --val-fraction to split its classes"
            )
        every, notes = _scan(root, run, classes)
        train, test = _split(every, run.seed, test_size=run.val_fraction)
        return Images(classes, train, test, notes)
    if run.val_fraction is not None:
        raise RecipeError(f"--data {root} is split already: --val-fraction can't be given")
    held_out = [name for name in ("val", "test") if (root / name).is_dir()]
    if not held_out:
        raise RecipeError(
            f"--data {root} has a folder train, but neither val nor test; to split train: "
            f"--data {root / 'train'} --val-fraction 0.2"
        )
    classes = _class_names(root / "train")
    train, notes = _scan(root / "train", run, classes)
    test, test_notes = _scan(root / held_out[0], run, classes)
    if len(held_out) == 2:
        notes += ("tested on val; test is left for `resnet-reg evaluate --split test`",)
    return Images(classes, train, test, notes + test_notes)


# What others call the folders train, val and test.
_LIKE_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones, as editors and notebooks make them."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: Path) -> bool:
    """By its name; a hidden file, as macOS writes beside each, is none."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def _images_in(folder: Path) -> Iterator[Path]:
    """The images in a folder and those inside it."""
    return (
        path
        for path in folder.rglob("*")
        if _is_image(path) and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _folders(folder))
    if not names:
        loose = any(map(_is_image, folder.iterdir()))
        what = "has images but no folders" if loose else "is empty"
        raise RecipeError(f"{folder} {what}: it needs a folder of images for each class")
    if len(names) == 1:
        raise RecipeError(f"{folder} has one class only ({names[0]}); at least two are needed")
    return names


def _scan(folder: Path, run: Run, classes: Sequence[str]) -> tuple[Split, tuple[str, ...]]:
    """The readable images of a folder of class folders."""
    found = tuple(path.name for path in _folders(folder))
    if not found:
        raise RecipeError(f"{folder} is empty: it needs a folder of images for each class")
    if unknown := sorted(set(found) - set(classes)):
        raise RecipeError(_other_classes(folder, found, classes, unknown[0]))
    paths = [
        (path, label)
        for label, name in enumerate(classes)
        if name in found
        for path in sorted(_images_in(folder / name))
    ]
    # Every image is decoded once before training: a bad one then stops nothing halfway.
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(_fault, (path for path, _ in paths)))
    bad = [(path, fault) for (path, _), fault in zip(paths, faults, strict=True) if fault]
    if bad and run.corrupt == "refuse":
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise RecipeError(
            f"can't read image {bad[0][0]}: {bad[0][1]}{others}; --corrupt skip leaves such out"
        )
    good = [item for item, fault in zip(paths, faults, strict=True) if not fault]
    present = {label for _, label in good}
    for label, name in enumerate(classes):
        if name in found and label not in present:
            raise RecipeError(f"{folder / name} has no image that can be used")
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    notes = tuple(f"skipped {path}: {fault}" for path, fault in bad)
    return Split([path for path, _ in good], labels), notes


def _other_classes(
    where: object, found: Sequence[str], known: Sequence[str], unknown: str | None = None
) -> str:
    name = unknown or next(iter(sorted(set(found) ^ set(known))), "their order")
    return f"{where} has other classes than the training: {name} (known: {', '.join(known)})"


def _fault(path: Path) -> str:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise many kinds
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _subset(split: Split, size: int | None, seed: int, part: str) -> Split:
    if size is None or size == len(split):
        return split
    if size > len(split):
        raise RecipeError(f"{_option(part)} {size} is more than the {len(split)} images there are")
    first, second = _split(split, seed, **{part: size})
    return first if part == "train_size" else second


def _split(split: Split, seed: int, **sizes: Any) -> tuple[Split, Split]:
    """Draws two parts, class by class."""
    counts = Counter(split.labels.tolist())
    try:
        first, second = train_test_split(
            range(len(split)), stratify=split.labels.numpy(), random_state=seed, **sizes
        )
    except ValueError:
        asked = " and ".join(
            f"{_option('val_fraction' if isinstance(value, float) else name)} {value}"
            for name, value in sizes.items()
        )
        raise RecipeError(
            f"can't split {len(split)} images of {len(counts)} classes, {min(counts.values())} to "
            f"{max(counts.values())} of each, with {asked}: each class needs two images, each part "
            "one of each class, and both together no more than there are"
        ) from None
    return split.take(first), split.take(second)


def transform(image_size: int, augment: str) -> Callable[[Any], Tensor]:
    """From a PIL image or a uint8 tensor to float32 (3, size, size), as ImageNet's are scaled."""
    whole = [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
    geometry = {
        "none": whole,
        "shift": [*whole, v2.RandomCrop(image_size, image_size // 8, padding_mode="edge")],
        "standard": [
            v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ],
    }[augment]
    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    steps: Callable[[Any], Tensor] = v2.Compose([v2.ToImage(), *geometry, *scale])
    return steps


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images as a model takes them, by (row, draw): ``draw`` seeds the augmentation."""

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
        if isinstance(image, Path):
            image = pil_loader(str(image))
        if not self.random:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw)
            return self.transform(image), label


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (row, draw) whose order depends on the seed and the epoch alone.

    So a run that is interrupted anywhere goes on as if it had not been: no random state has to be
    kept. Processes share each batch evenly, so that two see what one would.

    Args:
        count: how many images there are.
        batch_size: images a batch, all processes together.
        seed: decides the order and the draws.
        step: where to begin, counted in batches from the first epoch's start.
        rank: which process this is.
        world_size: of how many.
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
        # A last batch that is not full is left out: batch norm does badly on a few images.
        self.epoch, self.start = divmod(step, count // batch_size)

    def __len__(self) -> int:
        return self.count // self.batch_size

    @property
    def sampler(self) -> EpochBatches:
        """Where Lightning looks for ``set_epoch`` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        rows = torch.randperm(self.count, generator=generator).tolist()
        draws = torch.randint(2**62, (self.count,), generator=generator).tolist()
        keys = list(zip(rows, draws, strict=True))
        for batch in range(self.start, len(self)):
            first = batch * self.batch_size
            yield keys[first : first + self.batch_size][self.rank :: self.world_size]


class ImageData(pl.LightningDataModule):
    """Batches for Lightning. Its state is the step, from which training goes on."""

    def __init__(self, images: Images, run: Run) -> None:
        super().__init__()
        self.images, self.run = images, run
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
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
        """Training images as they are, then test images: both are measured alike."""
        assert self.trainer is not None
        return [
            evaluation_loader(split, self.run, self.trainer.global_rank, self.trainer.world_size)
            for split in (self.images.train, self.images.test)
        ]


def evaluation_loader(
    split: Split, run: Run, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """Batches in order, without augmentation, each image in one process."""
    keys = [(row, 0) for row in range(rank, len(split), world_size)]
    size = max(16, min(250, 1_000_000 // run.image_size**2))  # some hundreds of MB at the most
    batches = [keys[first : first + size] for first in range(0, len(keys), size)]
    dataset = ImageDataset(split, run.image_size)
    return DataLoader(dataset, batch_sampler=batches, num_workers=run.workers)
