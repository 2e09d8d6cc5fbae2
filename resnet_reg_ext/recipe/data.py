"""The images of a run: scikit-learn's digits or a folder, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .digits import WRITERS, draw_digits, every_digit
from .files import RecipeError
from .folders import class_names, digest, other_classes, same_classes, scan
from .groups import group_names, names_below, shared_groups
from .layouts import Layout, check_class_folders, find_layout, set_folders, training_folders
from .settings import DIGITS, Run, option_name
from .splits import (
    TEST_SEED,
    WHOLE,
    WORDS,
    Images,
    Source,
    Split,
    check_trainable,
    split_in_two,
    spoil_labels,
    subset,
)

Parts = dict[str, Split]
"""By "train", "val" and "test"; train is what the sets that are missing are drawn from."""


def load_images(run: Run) -> Images:
    """Reads and splits the images, and makes labels wrong on request.

    The seed decides all of it but the test images, which are the same for every seed.

    Raises:
        RecipeError: the folder, an image or a size can't be used.
    """
    images = _digits(run) if run.data == DIGITS else _folder(run)
    train = images.train
    if len(train) < run.batch_size:
        raise RecipeError(
            f"--batch-size {run.batch_size} is more than the {len(train)} training images"
        )
    check_trainable(train, images.classes)
    of_test = images.test.notes if images.test is not None else ()
    notes = (*images.notes, *train.notes, *images.validation.notes, *of_test)
    train = spoil_labels(train, run.label_noise, len(images.classes), run.seed)
    return replace(images, train=train, notes=tuple(dict.fromkeys(notes)))


def default_split(run: Run) -> str:
    """The split to evaluate on: test, or val where there are no test images."""
    if run.test_size == 0:
        return "val"
    if run.data == DIGITS or run.test_fraction is not None or not Path(run.data).is_dir():
        return "test"
    folders = find_layout(Path(run.data)).folders
    return "test" if "test" in folders or not {*folders, run.val_fraction} - {None} else "val"


def load_split(
    run: Run,
    split: str | None,
    classes: Sequence[str],
    data: str | None = None,
    source: Source | None = None,
) -> Split:
    """One split for evaluation, with true labels.

    The run's own images are split as in training, even if their folder has been moved. Other images
    are not split: a folder without folders for splits is taken whole.

    Args:
        run: the run that was trained.
        split: "train", "val" or "test"; None is ``default_split``.
        classes: the class names that the model knows, in its order.
        data: other images, as of ``run.data``; None takes those of the run.
        source: the files that the run was trained on, where they are known.

    Raises:
        RecipeError: there is no such split, its classes are others, or the images that the run
            split have changed.
    """
    trained_on = _place(run.data) if source is None else source.folder
    same = data is None or _place(data) == trained_on
    run = run if data is None else replace(run, data=data)
    as_is = run if same else _unsplit(run)
    own, split = split or default_split(run), split or default_split(as_is)
    if run.data == DIGITS:
        images = load_images(replace(as_is, label_noise=0.0, batch_size=2))
        if images.classes != tuple(classes):
            raise RecipeError(other_classes(run.data, images.classes, classes))
        return _named(images, split, run)
    root = _root(run)
    layout = find_layout(root, classes)
    if split in layout.folders and not (split == "train" and _draws(as_is)):
        return _load_folder(root, split, layout, as_is, classes)
    if layout.folders and not _draws(as_is):
        raise RecipeError(
            f"--data {root} has no folder {split}; --split may be {' or '.join(layout.folders)}"
        )
    return _load_drawn(run, own, classes, layout, same=same, source=source)


def _load_drawn(
    run: Run,
    split: str,
    classes: Sequence[str],
    layout: Layout,
    *,
    same: bool,
    source: Source | None,
) -> Split:
    """A split that the run drew, drawn again; the whole folder where it is another one."""
    root = _root(run)
    folders = set_folders(run, root, layout)
    parts = _scan(run, folders, classes)
    unchanged = source is not None and source.digest == _digest(root, parts)
    if not _draws(run) or not (same or unchanged):
        return replace(parts["train"], name=WHOLE)
    found = class_names(layout.folders.get("train", root))
    if not same_classes(found, classes):
        raise RecipeError(other_classes(root, found, classes))
    if source is not None and not unchanged:
        raise RecipeError(
            f"--data {root} is not what it was in training: images have come, gone or changed, "
            "so that its split would be another; put them back, or give --data a folder of "
            "other images"
        )
    return _named(_drawn(run, parts, folders, tuple(classes)), split, run)


def _named(images: Images, split: str, run: Run) -> Split:
    part = {"train": images.train, "val": images.validation, "test": images.test}[split]
    if part is None:
        raise RecipeError(f"--data {run.data} has no test images; --split may be train or val")
    own = tuple(note for note in part.notes if note not in images.notes)
    return replace(part, name=split, notes=(*images.notes, *own))


def _draws(run: Run) -> bool:
    """Whether a run draws a set from the training images."""
    return run.val_fraction is not None or run.test_fraction is not None


def _unsplit(run: Run) -> Run:
    """A run that takes each folder as it is."""
    run = replace(run, val_fraction=None, test_fraction=None, group_by="none")
    return replace(run, train_size=None, val_size=None, test_size=None)


def _load_folder(root: Path, split: str, layout: Layout, run: Run, classes: Sequence[str]) -> Split:
    """One of the folders for train, val and test, cut down as in training."""
    found = scan(layout.folders[split], classes, run.corrupt)
    name = f"{split}_size"
    size = getattr(run, name)
    if size is None or size in (0, len(found)):
        return replace(found, name=split)
    note = f"{size} of {len(found)} images, the same as in training: {option_name(name)} {size}"
    kept = subset(found, classes, size, _seed(split, run), split)
    return replace(kept, name=split, notes=(*kept.notes, note))


def _seed(part: str, run: Run) -> int:
    return TEST_SEED if part == "test" else run.seed


def _digits(run: Run) -> Images:
    every, classes, names = every_digit()
    if run.group_by != "none":
        every = _with_groups({"train": every}, {"train": names}, run)[0]["train"]
    train, validation, test = draw_digits(every, classes, run)
    notes = []
    if Path(DIGITS).is_dir():
        notes.append(
            "images: scikit-learn's; for those in the folder ./digits give --data ./digits"
        )
    if run.group_by != "none":
        notes.append(WRITERS)
    return Images(classes, train, validation, test, tuple(notes))


def _folder(run: Run) -> Images:
    root = _root(run)
    layout = find_layout(root)
    notes: list[str] = []
    if layout.is_split:
        notes = training_folders(root, layout, run)
        classes = class_names(layout.folders["train"])
    else:
        layout = Layout({})
        classes = class_names(root)
        check_class_folders(root)
        if run.val_fraction is None:
            raise RecipeError(
                f"--data {root} has no folder train: give --val-fraction to split its classes, "
                "and --test-fraction for images that nothing is chosen by"
            )
    folders = set_folders(run, root, layout)
    parts = _scan(run, folders, classes)
    images = _drawn(run, parts, folders, classes)
    source = Source(_place(run.data), _digest(root, parts))
    return replace(images, notes=(*images.notes, *notes), source=source)


def _scan(run: Run, folders: Mapping[str, Path], classes: Sequence[str]) -> Parts:
    return {part: scan(folder, classes, run.corrupt) for part, folder in folders.items()}


def _digest(root: Path, parts: Parts) -> str:
    return digest(root, *parts.values())


def _drawn(run: Run, parts: Parts, folders: Mapping[str, Path], classes: tuple[str, ...]) -> Images:
    """The sets that have no folder, drawn from the training images; all cut down to size."""
    notes: tuple[str, ...] = parts["train"].notes
    if run.group_by != "none":
        names = {part: names_below(folders[part], split.images) for part, split in parts.items()}
        parts, found = _with_groups(parts, names, run)
        notes = (*notes, *found)
    rest, drawn = parts["train"], {}
    left = 1.0
    for part, share in (("test", run.test_fraction), ("val", run.val_fraction)):
        if share is None or (part == "test" and run.test_size == 0):
            continue
        rest, drawn[part] = split_in_two(rest, classes, _seed(part, run), part, share / left)
        left -= share
    sets = {**parts, "train": rest, **drawn}
    cut = {
        part: subset(split, classes, getattr(run, f"{part}_size"), _seed(part, run), part)
        for part, split in sets.items()
    }
    return Images(classes, cut["train"], cut["val"], cut.get("test"), notes)


def _with_groups(
    parts: Parts, names: dict[str, list[str]], run: Run
) -> tuple[Parts, tuple[str, ...]]:
    """The images with their groups numbered; and notes on groups that are in two folders."""
    assert run.group_by != "none"
    groups = {part: group_names(found, run.group_by) for part, found in names.items()}
    numbers = {name: i for i, name in enumerate(sorted(set().union(*groups.values())))}
    with_groups = {
        part: replace(split, groups=torch.tensor([numbers[name] for name in groups[part]]))
        for part, split in parts.items()
    }
    words = {WORDS[part]: found for part, found in groups.items()}
    counted = ", ".join(f"{len(set(found))} {WORDS[part]}" for part, found in groups.items())
    counted = f"groups: {counted}" if len(groups) > 1 else f"{len(numbers)} groups"
    return with_groups, (f"--group-by {run.group_by}: {counted}", *shared_groups(words))


def _root(run: Run) -> Path:
    root = Path(run.data)
    if not root.is_dir():
        raise RecipeError(f"--data {root} is not a folder (nor {DIGITS!r})")
    return root


def _place(data: str) -> str:
    """The same string for the same folder, however its path is written."""
    return data if data == DIGITS else str(Path(data).resolve())
