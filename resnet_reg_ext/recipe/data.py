"""Images, splits and wrong labels; batches that depend on the seed and the epoch alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
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
WHOLE = "all images"


@dataclass(frozen=True)
class Split:
    """Images and labels of one split. ``images`` are paths, or uint8 tensors (3, h, w)."""

    images: Sequence[Path | Tensor]
    labels: Tensor
    """int64 (count,)"""
    wrong: int = 0
    """How many labels were made wrong on purpose."""
    name: str = ""
    """What ``load_split`` found it to be: one of ``SPLITS``, or ``WHOLE``."""
    notes: tuple[str, ...] = ()
    """What the user should know: files ignored, images skipped, classes missing."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Split:
        """Some of the images."""
        images = [self.images[i] for i in rows]
        return replace(self, images=images, labels=self.labels[list(rows)])


@dataclass(frozen=True)
class Source:
    """Which files a run was given; a checkpoint keeps it, to tell whether they are the same."""

    folder: str
    """The absolute path."""
    digest: str
    """Of the images' paths in the folder, their sizes and labels."""


@dataclass(frozen=True)
class Images:
    """What a run trains and tests on."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()
    """What the user should know: images skipped, splits left unused."""
    source: Source | None = None
    """None for the digits."""


def load_images(run: Run) -> Images:
    """Reads, splits and, where the run says so, spoils labels. The seed decides all of it.

    Raises:
        RecipeError: the folder, an image or a size can't be used.
    """
    images = _digits(run) if run.data == DIGITS else _folder(run)
    train, test = images.train, images.test
    if run.data != DIGITS:  # the digits are split to size at once
        train, test = _subsets(train, test, run)
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


def load_split(
    run: Run,
    split: str | None,
    classes: Sequence[str],
    data: str | None = None,
    source: Source | None = None,
) -> Split:
    """One split, for evaluation; its labels are true.

    The run's own images are split as in training, wherever they lie now. Other images are taken as
    they are: a folder without folders for splits is taken whole.

    Args:
        run: the run that was trained.
        split: "train", "val" or "test", the last two of which are one where the run splits the
            images; None is what ``default_split`` says.
        classes: the class names that the model knows, in its order.
        data: images as of ``run.data``; None takes those.
        source: what the run was given, where that is known.

    Raises:
        RecipeError: the split isn't there, its classes are others, or the images that the run split
            have changed.
    """
    trained_on = _place(run.data) if source is None else source.folder
    same = data is None or _place(data) == trained_on
    run = run if data is None else replace(run, data=data)
    as_is = run if same else replace(run, val_fraction=None, train_size=None, test_size=None)
    split = split or default_split(as_is)
    if run.data == DIGITS:
        images = load_images(replace(as_is, label_noise=0.0, batch_size=2))
        if images.classes != tuple(classes):
            raise RecipeError(_other_classes(run.data, images.classes, classes))
        train, test = images.train, images.test
    else:
        root = _root(run)
        there = [name for name in SPLITS if (root / name).is_dir()]
        if there and as_is.val_fraction is None:
            return _load_folder(root, split, there, as_is, classes)
        every = _scan(root, run, classes)
        unchanged = source is not None and source.digest == _digest(root, every)
        if run.val_fraction is None or not (same or unchanged):
            return replace(every, name=WHOLE)
        if _class_names(root) != tuple(classes):
            raise RecipeError(_other_classes(root, _class_names(root), classes))
        if source is not None and not unchanged:
            raise RecipeError(
                f"--data {root} is not what it was in training: images have come, gone or changed, "
                "so that its split would be another; put them back, or give --data a folder of "
                "other images"
            )
        train, test = _subsets(*_split(every, run.seed, test_size=run.val_fraction), run)
    return replace(train if split == "train" else test, name=split)


def _load_folder(
    root: Path, split: str, there: Sequence[str], run: Run, classes: Sequence[str]
) -> Split:
    """One of the folders train, val and test, cut down as in training."""
    if split not in there:
        raise RecipeError(
            f"--data {root} has no folder {split}; --split may be {' or '.join(there)}"
        )
    found = _scan(root / split, run, classes)
    # Where there are val and test, the training left test alone.
    tested = "val" if "val" in there else "test"
    part = {"train": "train_size", tested: "test_size"}.get(split)
    size = getattr(run, part) if part else None
    if part is None or size is None or size == len(found):
        return replace(found, name=split)
    note = f"{size} of {len(found)} images, the same as in training: {_option(part)} {size}"
    kept = _subset(found, size, run.seed, part)
    return replace(kept, name=split, notes=(*found.notes, note))


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


def _root(run: Run) -> Path:
    root = Path(run.data)
    if not root.is_dir():
        raise RecipeError(f"--data {root} is not a folder (nor {DIGITS!r})")
    return root


def _place(data: str) -> str:
    """Where images are, however the path is written."""
    return data if data == DIGITS else str(Path(data).resolve())


def _digest(root: Path, *splits: Split) -> str:
    """Tells apart folders whose splits may differ."""
    lines = [
        f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0{label}"
        for split in splits
        for path, label in zip(split.images, split.labels.tolist(), strict=True)
        if isinstance(path, Path)
    ]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _folder(run: Run) -> Images:
    root = _root(run)
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
        every = _scan(root, run, classes)
        train, test = _split(every, run.seed, test_size=run.val_fraction)
        source = Source(_place(run.data), _digest(root, every))
        return Images(classes, train, test, every.notes, source)
    if run.val_fraction is not None:
        raise RecipeError(f"--data {root} is split already: --val-fraction can't be given")
    held_out = [name for name in ("val", "test") if (root / name).is_dir()]
    if not held_out:
        raise RecipeError(
            f"--data {root} has a folder train, but neither val nor test; to split train: "
            f"--data {root / 'train'} --val-fraction 0.2"
        )
    classes = _class_names(root / "train")
    train = _scan(root / "train", run, classes)
    test = _scan(root / held_out[0], run, classes)
    notes = train.notes
    if len(held_out) == 2:
        notes += ("tested on val; test is left for `resnet-reg evaluate --split test`",)
    source = Source(_place(run.data), _digest(root, train, test))
    return Images(classes, train, test, notes + test.notes, source)


# What others call the folders train, val and test.
_LIKE_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones, as editors and notebooks make them."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: Path) -> bool:
    """By its name; a hidden file, as macOS writes beside each, is none."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def _visible(folder: Path) -> Iterator[Path]:
    """What is in a folder and those inside it, but for what is hidden."""
    return (
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _images_in(folder: Path) -> Iterator[Path]:
    """The images in a folder and those inside it."""
    return filter(_is_image, _visible(folder))


def _ignored(folder: Path, taken: Set[Path]) -> str:
    """How many files are not taken for images, by the end of their names; "" for none."""
    files = [path for path in _visible(folder) if path not in taken and path.is_file()]
    if not files:
        return ""
    ends = Counter(path.suffix.lower() or "without a suffix" for path in files)
    listed = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    return f"ignored {len(files)} {'file' if len(files) == 1 else 'files'}: {listed}"


def _found(folder: Path) -> tuple[str, ...]:
    """The names of a folder's class folders."""
    names = tuple(path.name for path in _folders(folder))
    if not names:
        if any(map(_is_image, folder.iterdir())):
            what = "has images but no folders"
        else:
            what = "has no folders" if any(_visible(folder)) else "is empty"
        raise RecipeError(f"{folder} {what}: it needs a folder of images for each class")
    return names


def _class_names(folder: Path) -> tuple[str, ...]:
    names = _found(folder)
    if len(names) == 1:
        raise RecipeError(f"{folder} has one class only ({names[0]}); at least two are needed")
    return names


def _scan(folder: Path, run: Run, classes: Sequence[str]) -> Split:
    """The images of a folder of class folders that can be used."""
    found = _found(folder)
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
    taken = {path for path, _ in paths}
    present = {label for _, label in good}
    for label, name in enumerate(classes):
        if name in found and label not in present:
            ignored = _ignored(folder / name, taken)
            why = f"; {ignored} (images end in {', '.join(IMG_EXTENSIONS)})" if ignored else ""
            raise RecipeError(f"{folder / name} has no image that can be used{why}")
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    notes = [f"skipped {path}: {fault}" for path, fault in bad]
    if ignored := _ignored(folder, taken):
        notes.append(f"{folder}: {ignored}")
    if missing := [name for name in classes if name not in found]:
        notes.append(f"{folder} has no images of {', '.join(missing)}")
    return Split([path for path, _ in good], labels, notes=tuple(notes))


def _other_classes(
    where: object, found: Sequence[str], known: Sequence[str], unknown: str | None = None
) -> str:
    name = unknown or next(iter(sorted(set(found) ^ set(known))), "their order")
    return f"{where} has other classes than the training: {name} (known: {', '.join(known)})"


def _fault(path: Path) -> str:
    """Why an image can't be used; "" if it can."""
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
    except Exception as error:  # Pillow's decoders raise many kinds
        return " ".join(str(error).split()) or type(error).__name__
    if mode.startswith(("I", "F")):  # 16 and 32 bits: Pillow's conversion would clip them to white
        return f"its pixels have more than 8 bits (Pillow's mode {mode}); convert it to 8 bits"
    return ""


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _subsets(train: Split, test: Split, run: Run) -> tuple[Split, Split]:
    return (
        _subset(train, run.train_size, run.seed, "train_size"),
        _subset(test, run.test_size, run.seed, "test_size"),
    )


def _subset(split: Split, size: int | None, seed: int, part: str) -> Split:
    """Draws one part, class by class."""
    if size is None or size == len(split):
        return split
    if size > len(split):
        raise RecipeError(f"{_option(part)} {size} is more than the {len(split)} images there are")
    try:
        first, second = _draw(split, seed, **{part: size})
    except ValueError:  # scikit-learn wants one of each class in what is left over too
        if size < len(set(split.labels.tolist())):
            why = "each class needs one image"
            raise RecipeError(_unsplittable(split, {part: size}, why)) from None
        return split.take(_stratified(split.labels, size, seed))
    return first if part == "train_size" else second


def _stratified(labels: Tensor, size: int, seed: int) -> list[int]:
    """Rows: one of each class, and the others in proportion, by largest remainders."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == label].tolist() for label in sorted(set(labels.tolist()))]
    to_share, left = size - len(by_class), len(labels) - len(by_class)
    shares = [divmod(to_share * (len(rows) - 1), left) for rows in by_class]
    counts = [1 + whole for whole, _ in shares]
    largest = sorted(range(len(shares)), key=lambda i: shares[i][1], reverse=True)
    for i in largest[: size - sum(counts)]:
        counts[i] += 1
    return sorted(row for rows, count in zip(by_class, counts, strict=True) for row in rows[:count])


def _split(split: Split, seed: int, **sizes: Any) -> tuple[Split, Split]:
    """Draws two parts, class by class."""
    try:
        return _draw(split, seed, **sizes)
    except ValueError:
        why = (
            "each class needs two images, each part one of each class, and both together no more "
            "than there are"
        )
        raise RecipeError(_unsplittable(split, sizes, why)) from None


def _draw(split: Split, seed: int, **sizes: Any) -> tuple[Split, Split]:
    first, second = train_test_split(
        range(len(split)), stratify=split.labels.numpy(), random_state=seed, **sizes
    )
    return split.take(first), split.take(second)


def _unsplittable(split: Split, sizes: Mapping[str, Any], why: str) -> str:
    counts = Counter(split.labels.tolist()).values()
    asked = " and ".join(
        f"{_option('val_fraction' if isinstance(value, float) else name)} {value}"
        for name, value in sizes.items()
    )
    return (
        f"can't split {len(split)} images of {len(counts)} classes, {min(counts)} to {max(counts)} "
        f"of each, with {asked}: {why}"
    )


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


_PRIME = 1_000_003


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
        # Of a seed torch takes 32 bits; a prime keeps the seeds' epochs apart.
        seed = (_PRIME * self.seed + self.epoch) % 2**32
        generator = torch.Generator().manual_seed(seed)
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
