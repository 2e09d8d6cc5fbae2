"""Which folder is trained on, which chooses weights and strengths, and which only measures."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .files import RecipeError, printable
from .folders import class_folders
from .settings import SPLITS, Run
from .walk import list_folder, walk

# In lower case; Roboflow writes valid, Keras' guides validation, Hugging Face reads dev as well.
_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# Names that may stand for a split, though it isn't clear for which or in which sense.
_LIKE_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?)([-_ .]?(set|data|images?|\d+))?"
)
_USES = {"train": "trained", "val": "validated", "test": "tested"}
# A folder beside class folders that is called so is no class.
_NO_CLASS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


@dataclass(frozen=True)
class Layout:
    """The folders for splits in a folder."""

    folders: dict[str, Path]
    """By "train", "val" and "test", as far as there are any."""
    unclear: tuple[str, ...] = ()
    """Names of folders that may be for splits too."""

    @property
    def is_split(self) -> bool:
        """Whether it is a folder of splits to train on, not of classes."""
        train = self.folders.get("train")
        return train is not None and (train.name == "train" or len(self.folders) > 1)


def find_layout(root: Path, classes: Collection[str] = ()) -> Layout:
    """Finds the folders for splits by their names, as they are commonly called.

    The names train, val and test win over others for the same split.

    Args:
        root: the folder that may hold folders for splits.
        classes: names that are known to be classes; only train, val and test are splits then.

    Raises:
        RecipeError: two folders may be for the same split.
    """
    names = [path.name for path in list_folder(root).folders]
    folders, unclear = {}, []
    for split in SPLITS:
        fitting = [name for name in names if name.lower() in _NAMES[split] and name not in classes]
        if split in names:
            folders[split] = root / split
            unclear += [name for name in fitting if name != split]
        elif len(fitting) > 1:
            raise RecipeError(
                f"--data {root} has the folders {' and '.join(fitting)}, which may both be "
                f"{split}: call one of them {split}"
            )
        elif fitting:
            folders[split] = root / fitting[0]
    known = {name for several in _NAMES.values() for name in several}
    unclear += [n for n in names if n.lower() not in known and _LIKE_SPLIT.fullmatch(n.lower())]
    return Layout(folders, tuple(unclear))


def training_folders(root: Path, layout: Layout, run: Run) -> list[str]:
    """Checks that each set has a folder or is drawn; notes that say what is used for what.

    Raises:
        RecipeError: it isn't clear, a set has both, or there are no validation images.
    """
    train, folders = layout.folders["train"], layout.folders
    if "val" not in folders:
        # A folder test that is there leaves only validation for the unclear ones.
        known = ("train", "test") if "test" in folders else ("train",)
        suspects = [n for n in layout.unclear if not n.lower().startswith(known)]
        if suspects:
            meant, remedy = (
                ("validation", "val") if "test" in folders else ("a split", "val or test")
            )
            raise RecipeError(
                f"--data {root} has a folder {suspects[0]}, which may be for {meant}: call it "
                f"{remedy}, or move it elsewhere if it is not to be used"
            )
    for part, share in (("val", run.val_fraction), ("test", run.test_fraction)):
        if part in folders and share is not None:
            raise RecipeError(
                f"--data {root} has a folder {folders[part].name}: --{part}-fraction can't be given"
            )
    if "val" not in folders and run.val_fraction is None:
        why = "test must not choose the weights that it measures" if "test" in folders else ""
        raise RecipeError(
            f"--data {root} has a folder {train.name}, but no val{why and f', and {why}'}: give "
            f"--val-fraction 0.2 to choose by a part of {train.name}"
        )
    said = {part: folders[part].name for part in SPLITS if part in folders}
    note = ""
    if any(name != part for part, name in said.items()):
        words = [f"{what} on {said[part]}" for part, what in _USES.items() if part in said]
        note = ", ".join(words)
    notes = [note] if note else []
    if layout.unclear:
        notes.append(f"left unused: {', '.join(layout.unclear)}")
    return notes


def set_folders(run: Run, root: Path, layout: Layout) -> dict[str, Path]:
    """The folder of each set that has one; the folder of classes is "train"'s where none has."""
    folders = {part: layout.folders[part] for part in SPLITS if part in layout.folders}
    if "train" not in folders:
        return {"train": root}
    if run.test_size == 0:
        folders.pop("test", None)
    return folders


def check_class_folders(root: Path) -> None:
    """Refuses class folders that hold splits or class folders themselves.

    Raises:
        RecipeError: names the folder.
    """
    folders = class_folders(root)
    like_splits = [name for name in folders if _LIKE_SPLIT.fullmatch(name.lower())]
    kinds = {name.lower().startswith("train") for name in like_splits}
    for name in folders:
        # test1 may be a class, but hardly beside a train1.
        if name.lower() in _NO_CLASS or (len(kinds) == 2 and name in like_splits):
            raise RecipeError(
                f"--data {root} has a folder {name}, which looks like a split and not like a "
                "class: splits must be called train, val and test"
            )
    for name, folder in folders.items():
        listing = list_folder(folder)
        if not listing.images and any(walk(path).images for path in listing.folders):
            raise RecipeError(
                f"--data {root} has no images in {name}, but in folders inside it: is "
                f"{printable(str(folder))} the folder of class folders?"
            )
