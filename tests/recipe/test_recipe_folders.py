"""Folders of images as they are found in the field: splits, links, system folders, names."""

import os
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image
from test_recipe_data import make_images, refused, run_for
from torchvision.datasets import ImageFolder

from resnet_reg_ext.recipe.data import default_split, load_images, load_split
from resnet_reg_ext.recipe.files import RecipeError, printable
from resnet_reg_ext.recipe.settings import Run

CLASSES = ["cat", "dog"]


def make_splits(root, names, count=4):
    for name in names:
        make_images(root / name, CLASSES, count=count)
    return run_for(root)


def split_folders(split):
    return {path.parent.parent.name for path in split.images}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("training", "validation", "testing"),
        ("TRAIN", "VALID", "TEST"),
        ("train", "dev", "test"),
        ("Training", "val", "Test"),
    ],
)
def test_splits_of_other_names_are_known(train, val, test, tmp_path):
    run = make_splits(tmp_path, [train, val])
    images = load_images(run)
    assert split_folders(images.train) == {train}
    assert split_folders(images.validation) == {val}
    assert images.notes == (f"trained on {train}, validated on {val}",)
    assert default_split(run) == "val"
    make_images(tmp_path / test, CLASSES)
    images = load_images(run)
    assert split_folders(images.test) == {test}
    assert images.notes == (f"trained on {train}, validated on {val}, tested on {test}",)
    assert default_split(run) == "test"
    for split, name in (("train", train), ("val", val), ("test", test)):
        found = load_split(run, split, CLASSES)
        assert (found.name, split_folders(found)) == (split, {name})


def test_val_is_drawn_only_where_no_folder_may_be_for_validation(tmp_path):
    run = replace(make_splits(tmp_path, ["train", "Testing"]), val_fraction=0.5)
    images = load_images(run)
    assert "trained on train, tested on Testing" in images.notes
    for name in ("eval", "val2017", "validation_set", "Evaluation"):
        make_images(tmp_path / name, CLASSES)
        said = refused(run)
        assert f"has a folder {name}, which may be for validation: call it val" in said
        (tmp_path / name).rename(tmp_path.with_name(f"{tmp_path.name}-{name}"))


@pytest.mark.parametrize("name", ["test_images", "eval", "val2017"])
def test_a_folder_that_may_be_for_a_split_is_named_rather_than_train_split(name, tmp_path):
    said = refused(make_splits(tmp_path, ["train", name]))
    assert f"has a folder {name}, which may be for a split: call it val or test" in said


def test_more_folders_for_train_and_test_are_left_unused(tmp_path):
    run = make_splits(tmp_path, ["train", "Train", "test", "test2", "testing"])
    run = replace(run, val_fraction=0.5)
    images = load_images(run)
    assert (split_folders(images.train), split_folders(images.test)) == ({"train"}, {"test"})
    assert images.notes == ("left unused: Train, testing, test2",)


def test_a_name_that_is_exact_wins_and_the_rest_is_said(tmp_path):
    run = make_splits(tmp_path, ["train", "val", "valid", "eval"])
    images = load_images(run)
    assert split_folders(images.validation) == {"val"}
    assert images.notes == ("left unused: valid, eval",)


def test_two_names_for_one_split_are_refused(tmp_path):
    run = make_splits(tmp_path, ["train", "Validation", "valid"])
    assert "has the folders Validation and valid, which may both be val" in refused(run)


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("train_images", "test_images")])
def test_splits_whose_names_say_more_are_no_classes(names, tmp_path):
    make_splits(tmp_path, names)
    said = refused(run_for(tmp_path, val_fraction=0.5))
    assert "looks like a split and not like a class" in said


def test_classes_may_have_names_like_those_of_splits(tmp_path):
    make_images(tmp_path, ["test1", "test2", "dev"])
    assert load_images(run_for(tmp_path, val_fraction=0.5)).classes == ("dev", "test1", "test2")
    make_images(tmp_path / "other", ["invalid", "valid"])
    found = load_split(run_for(tmp_path), None, ["invalid", "valid"], str(tmp_path / "other"))
    assert len(found) == 12


def names_of(images):
    return Counter(
        path.name for split in (images.train, images.validation) for path in split.images
    )


def test_links_inside_a_class_are_followed(tmp_path):
    root = make_images(tmp_path / "data", ["a", "b"], count=2)
    make_images(tmp_path / "far", ["x"], count=3)
    make_images(tmp_path / "far" / "x", ["deep"], count=2)
    for i, path in enumerate(sorted((tmp_path / "far").rglob("*.png"))):
        path.rename(path.with_name(f"far{i}.png"))
    (root / "a" / "folder").symlink_to("../../far/x")
    (root / "a" / "file.png").symlink_to(root / "b" / "0.png")
    (root / "c").symlink_to(tmp_path / "far")
    (root / "b" / "sub").mkdir()
    (root / "b" / "sub" / "0.png").symlink_to("../1.png")
    (tmp_path / "far" / "top.png").symlink_to(root / "a" / "0.png")
    images = load_images(run_for(root, val_fraction=0.5))
    expected = Counter(path.rpartition("/")[2] for path, _ in ImageFolder(root).samples)
    assert names_of(images) == expected
    assert sum(expected.values()) == 2 + 2 + 1 + 1 + 5 + 5 + 1
    assert images.notes == ()


@pytest.mark.parametrize("target", [".", "..", "../..", "sub", "../a/sub", "{root}/a"])
def test_a_link_back_up_or_to_what_is_taken_takes_nothing_twice(target, tmp_path):
    root = make_images(tmp_path / "data", ["a", "b"])
    make_images(root / "a", ["sub"], count=2)
    # Listed before and after the real folder, and once more by way of a link to a link.
    for name in ("aside", "under"):
        (root / "a" / name).symlink_to(target.format(root=root))
    (root / "a" / "zigzag").symlink_to("under")
    images = load_images(run_for(root, val_fraction=0.5))
    assert sum(names_of(images).values()) == 14
    # Images keep the path through the real folder.
    assert not any(
        "aside" in path.parts for path in (*images.train.images, *images.validation.images)
    )
    (note,) = images.notes
    assert note.startswith(f"passed over the link {root / 'a' / 'aside'} and 2 more: ")


def test_two_links_to_each_other_s_folders_end(tmp_path):
    root = make_images(tmp_path / "data", ["a", "b"], count=2)
    make_images(tmp_path / "far", ["x", "y"], count=2)
    (tmp_path / "far" / "x" / "to").symlink_to("../y")
    (tmp_path / "far" / "y" / "to").symlink_to("../x")
    (root / "a" / "in").symlink_to("../../far/x")
    images = load_images(run_for(root, val_fraction=0.5))
    assert sum(names_of(images).values()) == 2 + 2 + 2 + 2


def test_system_folders_are_no_classes_and_hold_no_images(tmp_path):
    make_images(tmp_path, ["a", "b"])
    # In the folder of classes and in a class; empty, with images, in other capitals.
    for name in ("__MACOSX", "lost+found", ".ipynb_checkpoints", "$RECYCLE.BIN"):
        (tmp_path / name).mkdir()
    make_images(tmp_path / "__MACOSX", ["a"])
    make_images(tmp_path / "a", ["@eaDir", ".AppleDouble", "System Volume Information"])
    make_images(tmp_path / "b", ["@eadir"])
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / ".0.png")
    images = load_images(run_for(tmp_path, val_fraction=0.5))
    assert images.classes == ("a", "b")
    assert sum(names_of(images).values()) == 11
    assert images.notes == (
        f"{tmp_path}: ignored 2 files: .db 1, .ini 1",
        f"{tmp_path}: passed over hidden and system files: $RECYCLE.BIN 1, .AppleDouble 1, "
        ".ipynb_checkpoints 1, @eaDir 1, @eadir 1, System Volume Information 1, __MACOSX 1, "
        "hidden images 1, lost+found 1",
    )


def test_system_folders_beside_splits_and_in_them_change_nothing(tmp_path):
    run = make_splits(tmp_path, ["train", "val"])
    for name in ("__MACOSX", "train/@eaDir", "val/.ipynb_checkpoints"):
        make_images(tmp_path / name, ["cat"])
    images = load_images(run)
    assert images.classes == ("cat", "dog")
    assert (len(images.train), len(images.validation)) == (8, 8)


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    make_images(tmp_path, ["a", "b"])
    make_images(tmp_path / "a", ["more.png"], count=3)
    assert sum(names_of(load_images(run_for(tmp_path, val_fraction=0.5))).values()) == 15


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"caf\xe9", r"caf\udce9"),
        (b"a\nb", r"a\nb"),
        ("苹果".encode(), "苹果"),
        (b"\x1b[1m", r"\x1b[1m"),
    ],
)
@pytest.mark.parametrize("layout", ["fraction", "splits"])
def test_class_names_can_always_be_written(raw, name, layout, tmp_path):
    folders = ("train", "val") if layout == "splits" else (".",)
    for folder in folders:
        make_images(tmp_path / folder, ["b", "x"])
        os.rename(tmp_path / folder / "x", os.fsencode(tmp_path / folder) + b"/" + raw)
    run = run_for(tmp_path, **({} if layout == "splits" else {"val_fraction": 0.5}))
    images = load_images(run)
    assert images.classes.count(name) == 1
    assert name.encode().decode() == name == printable(os.fsdecode(raw))
    label = images.classes.index(name)
    for split in (
        images.train,
        images.validation,
        load_split(run, "val", images.classes),
    ):
        assert {
            int(found)
            for path, found in zip(split.images, split.labels, strict=True)
            if os.fsencode(path.parent.name) == raw
        } == {label}


def test_a_file_s_name_that_is_not_utf_8_can_be_said(tmp_path):
    make_images(tmp_path, ["a", "b"])
    for name in (b"bad\xe9.png", b"two\nlines.png"):
        with open(os.fsencode(tmp_path / "a") + b"/" + name, "wb") as file:
            file.write(b"x")
    run = run_for(tmp_path, val_fraction=0.5, corrupt="skip")
    notes = load_images(run).notes
    assert notes[0].startswith(rf"skipped {tmp_path / 'a'}/bad\udce9.png: ")
    assert notes[1].startswith(rf"skipped {tmp_path / 'a'}/two\nlines.png: ")
    assert r"bad\udce9.png" in refused(run_for(tmp_path, val_fraction=0.5))


def test_unicode_forms_of_a_name_are_the_same_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    make_images(tmp_path / "train", [composed, "dog"], count=3)
    make_images(tmp_path / "val", [decomposed, "dog"], count=2)
    images = load_images(run_for(tmp_path))
    assert images.classes == (composed, "dog")
    assert images.validation.labels.tolist() == [0, 0, 1, 1]
    assert not images.notes
    # Two such folders side by side are one class to whoever looks at them.
    make_images(tmp_path / "train", [decomposed])
    assert "2 folders that are called café, in different Unicode forms" in refused(
        run_for(tmp_path)
    )


def test_a_checkpoint_s_classes_are_known_in_another_unicode_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    make_images(tmp_path, [decomposed, "z"])
    run = run_for(tmp_path, val_fraction=0.5)
    found = load_split(run, "val", [composed, "z"])
    assert found.images == load_images(run).validation.images


@pytest.mark.parametrize("names", [["A", "a"], ["Straße", "STRASSE"]])
def test_classes_that_differ_in_case_only_are_noted(names, tmp_path):
    make_images(tmp_path, [*names, "z"])
    images = load_images(run_for(tmp_path, val_fraction=0.5))
    assert images.classes == (*sorted(names), "z")
    assert images.notes == (
        f"{tmp_path} has classes that differ in upper and lower case only: "
        f"{'/'.join(sorted(names))}",
    )


def test_a_folder_called_digits_is_not_passed_over_in_silence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_images(Run()).notes == ()
    make_images(tmp_path / "elsewhere", CLASSES)
    (tmp_path / "digits").symlink_to("elsewhere")
    run = Run(batch_size=2)
    (note,) = load_images(run).notes
    assert "./digits" in note
    assert load_split(run, "test", [str(digit) for digit in range(10)]).notes == (note,)
    there = load_images(run_for("./digits", val_fraction=0.5))
    assert there.classes == ("cat", "dog")
    assert there.notes == ()
    (tmp_path / "digits").unlink()
    (tmp_path / "digits").write_text("no folder")
    assert load_images(run).notes == ()


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make_images(tmp_path, ["a", "b"])
    (tmp_path / "a" / "loop").symlink_to("loop")
    assert len(load_images(run_for(tmp_path, val_fraction=0.5)).train) == 6

    def scandir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(RecipeError, match=r"can't read the folder .*: Permission denied"):
        load_images(run_for(tmp_path, val_fraction=0.5))


def test_images_are_in_the_order_of_their_paths(tmp_path):
    """Splits of earlier versions are drawn by that order."""
    make_images(tmp_path, ["a", "b"], count=3)
    for name in ("sub/z.png", "sub-1/y.png", "sub.png"):
        path = tmp_path / "a" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    found = load_split(run_for(tmp_path), None, ["a", "b"])
    assert found.images == sorted(tmp_path.rglob("*.png"))
