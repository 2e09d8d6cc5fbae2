"""What the recipe is given: which images are measured, which are refused, and what is said.

One network is trained, for two steps; the other checkpoints are those of new networks.
"""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_recipe_data import make_images, refused, run_for

from resnet_reg_ext import cli
from resnet_reg_ext.recipe import plots
from resnet_reg_ext.recipe.data import load_images, load_split
from resnet_reg_ext.recipe.evaluate import evaluate
from resnet_reg_ext.recipe.files import RecipeError
from resnet_reg_ext.recipe.model import Classifier, load_classifier
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.train import train
from resnet_reg_ext.recipe.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

CLASSES = ("cat", "dog")


def said(function, *arguments, **options):
    """The one sentence of a refusal."""
    with pytest.raises(RecipeError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def save(path, run, change=None):
    """Writes the checkpoint of a new network, as training would."""
    images = load_images(run)
    classifier = Classifier(run, images.classes, images.source)
    if change:
        change(classifier.model)
    content = {"state_dict": classifier.state_dict(), "optimizer_states": []}
    classifier.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def measure(path, out, data=None, split=None, corrupt="refuse"):
    """What ``evaluate`` writes; JSON has no NaN."""
    evaluate(path, data, split, corrupt, out, overwrite=True)
    text = (out / "evaluation.txt").read_text()
    return json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail), text


def count(told):
    return sum(map(sum, told["confusion"]))


def split_folder(root, counts):
    """A folder with folders for splits; ``counts`` are images a class."""
    for split, number in counts.items():
        make_images(root / split, CLASSES, count=number)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the images ``hard`` and the run ``out``, which has split them."""
    root = tmp_path_factory.mktemp("trained")
    make_images(root / "hard", CLASSES, count=10)
    options = ["--val-fraction", "0.3", "--image-size", "8", "--batch-size", "7", "--epochs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        options += ["--data", "hard", "--accelerator", "cpu", "--out", "out"]
        assert cli.main(["train", *options]) == 0
    return root


@pytest.mark.parametrize(
    ("place", "data"),
    [(".", None), (".", "hard"), (".", "hard/"), ("out", "../hard"), ("out", "{root}/hard")],
)
@pytest.mark.parametrize("split", ["train", "val", None])
def test_a_run_s_images_are_split_as_in_training_however_they_are_named(
    place, data, split, trained, monkeypatch
):
    classifier = load_classifier(trained / "out" / "last.ckpt")
    expected = load_images(replace(classifier.run, data=str(trained / "hard")))
    monkeypatch.chdir(trained / place)
    given = data and data.format(root=trained)
    found = load_split(classifier.run, split, CLASSES, given, classifier.source)
    assert found.name == (split or "val")
    assert [path.resolve() for path in found.images] == (
        expected.train if split == "train" else expected.validation
    ).images
    assert len(found) == (14 if split == "train" else 6)


def test_evaluate_tells_a_run_s_images_from_others(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    last = trained / "out" / "last.ckpt"
    told, text = measure(last, tmp_path / "named", data=str(trained / "hard"))
    assert (count(told), told["split"]) == (6, "val")
    assert "(val)" in text
    # The same images elsewhere are still those that it was trained on.
    shutil.copytree(trained / "hard", tmp_path / "moved")
    told, _ = measure(last, tmp_path / "copied", data=str(tmp_path / "moved"))
    assert (count(told), told["split"]) == (6, "val")
    # These have the same names, but other sizes.
    make_images(tmp_path / "others", CLASSES, count=10, size=40)
    told, text = measure(last, tmp_path / "whole", data=str(tmp_path / "others"))
    assert (count(told), told["split"]) == (20, "all images")
    assert "20 images of" in text
    assert "(all images)" in text
    assert "val" not in text.splitlines()[0].replace(str(tmp_path), "")


@pytest.mark.parametrize("change", ["one more", "one less", "another size"])
def test_a_folder_that_has_changed_is_not_split_again(change, tmp_path):
    data, out = make_images(tmp_path / "data", CLASSES, count=10), tmp_path / "out"
    run = run_for(data, val_fraction=0.3)
    out.mkdir()
    last = save(out / "last.ckpt", run)
    if change == "one more":
        shutil.copy(data / "cat" / "0.png", data / "cat" / "new.png")
    elif change == "one less":
        (data / "cat" / "0.png").unlink()
    else:
        Image.new("RGB", (40, 40)).save(data / "cat" / "0.png")
    for given in (None, str(data)):
        words = said(evaluate, last, given, None, "refuse", tmp_path / "evaluation")
        assert f"--data {data} is not what it was in training" in words
        assert "images have come, gone or changed" in words
    words = said(train, run, out, resume=True)
    assert f"--data {data} is not what {last} was trained on" in words
    # Nothing has been written.
    assert list(out.iterdir()) == [last]
    assert not (tmp_path / "evaluation").exists()


def test_a_resumption_wants_the_images_of_folders_for_splits_too(tmp_path):
    run = run_for(split_folder(tmp_path / "data", {"train": 4, "val": 2}))
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "last.ckpt", run)
    (tmp_path / "data" / "train" / "dog" / "3.png").unlink()
    assert "images have come, gone or changed" in said(train, run, tmp_path / "out", resume=True)


def test_a_checkpoint_that_does_not_tell_its_images_is_measured_as_before(tmp_path):
    """Those of earlier versions don't."""
    run = run_for(make_images(tmp_path, CLASSES, count=10), val_fraction=0.3)
    images = load_images(run)
    for data in (None, run.data, f"{run.data}/"):
        assert load_split(run, "val", CLASSES, data).images == images.validation.images


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.uint16, "x.png"), (np.uint16, "x.tif"), (np.int32, "x.tif"), (np.float32, "x.tif")],
)
def test_pixels_of_more_than_8_bits_are_refused_or_left_out(dtype, name, tmp_path):
    make_images(tmp_path, CLASSES)
    Image.fromarray(np.full((12, 12), 300, dtype=dtype)).save(tmp_path / "cat" / name)
    run = run_for(tmp_path, val_fraction=0.5)
    words = refused(run)
    assert str(tmp_path / "cat" / name) in words
    assert "more than 8 bits" in words
    images = load_images(replace(run, corrupt="skip"))
    assert len(images.train) + len(images.validation) == 12
    assert "more than 8 bits" in images.notes[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_and_fewer_are_taken(mode, tmp_path):
    make_images(tmp_path, CLASSES)
    name = "x.jpg" if mode == "CMYK" else "x.png"
    Image.new(mode, (12, 12)).save(tmp_path / "cat" / name)
    images = load_images(run_for(tmp_path, val_fraction=0.5))
    assert len(images.train) + len(images.validation) == 13


def spoil(model):
    with torch.no_grad():
        model.conv1.weight.fill_(torch.nan)


def collapse(model):
    """Gives all images the same features, but for about what rounding does."""
    with torch.no_grad():
        for block in model.layer4:
            block.bn3.weight.zero_()
        normalise = model.layer4[0].downsample[1]
        normalise.weight.fill_(1e-7)
        normalise.bias.fill_(1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [(spoil, "features are not finite"), (collapse, "features of all images are the same")],
)
def test_features_that_show_nothing_are_left_out(change, words, tmp_path):
    run = run_for(make_images(tmp_path / "data", CLASSES), val_fraction=0.5)
    path = save(tmp_path / "x.ckpt", run, change)
    out = tmp_path / "out"
    out.mkdir()
    (out / "features.png").write_bytes(b"of a former checkpoint")
    _, text = measure(path, out)
    assert f"features.png is left out: the {words}" in text
    assert not (out / "features.png").exists()
    assert (out / "confusion.png").is_file()


def enlarge(model):
    """Makes features finite, but too large to be squared in float32."""
    with torch.no_grad():
        model.layer4[2].bn3.weight.fill_(1e30)


@pytest.mark.parametrize("change", [None, enlarge])
def test_projections_tell_their_share_of_the_variance(change, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "features", lambda projections, *_: drawn.update(projections))
    run = run_for(make_images(tmp_path / "data", CLASSES), val_fraction=0.5)
    evaluate(save(tmp_path / "x.ckpt", run, change), None, None, "refuse", tmp_path / "out")
    first, second = drawn
    shares = re.fullmatch(r"PCA, (\d+)% and (\d+)% of the variance", first)
    assert int(shares[1]) >= int(shares[2])
    # Rounded to whole per cent.
    assert 0 < int(shares[1]) + int(shares[2]) <= 101
    assert second == "t-SNE"
    for points in drawn.values():
        assert points.shape == (6, 2)
        assert np.isfinite(points).all()


def test_a_size_is_applied_as_in_training(tmp_path):
    root = split_folder(tmp_path / "data", {"train": 8, "val": 7, "test": 5})
    run = run_for(root, train_size=6, val_size=4, test_size=2)
    images = load_images(run)
    sets = (("train", images.train), ("val", images.validation), ("test", images.test))
    for split, expected in sets:
        found = load_split(run, split, CLASSES)
        assert found.images == expected.images
        assert torch.equal(found.labels, expected.labels)
        assert "the same as in training" in found.notes[-1]
    # Other images are not cut down.
    other = split_folder(tmp_path / "other", {"val": 3})
    assert len(load_split(run, None, CLASSES, str(other))) == 6


@pytest.mark.parametrize("part", ["train_size", "val_size"])
@pytest.mark.parametrize(("counts", "size"), [((12, 12, 12), 35), ((20, 1, 4), 23), ((5, 5), 9)])
def test_only_the_images_that_are_kept_need_one_of_each_class(part, counts, size, tmp_path):
    classes = "abc"[: len(counts)]
    for split in ("train", "val"):
        for name, number in zip(classes, counts, strict=True):
            make_images(tmp_path / split, [name], count=number)
    first, again, other = (
        load_images(run_for(tmp_path, seed=seed, **{part: size})) for seed in (0, 0, 1)
    )
    kept, same, others = (
        images.train if part == "train_size" else images.validation
        for images in (first, again, other)
    )
    assert len(kept) == len(set(kept.images)) == size
    assert kept.images == same.images != others.images
    assert all(
        path.parent.name == classes[c] for path, c in zip(kept.images, kept.labels, strict=True)
    )
    for number, drawn in zip(counts, torch.bincount(kept.labels).tolist(), strict=True):
        assert 1 <= drawn <= number
        # Within one of the exact share; one of each class is there before that.
        assert abs(drawn - size * number / sum(counts)) <= 1


def test_sizes_that_could_be_drawn_before_give_the_same_images(tmp_path):
    """The results in docs/ were made with these splits."""
    make_images(tmp_path, CLASSES, count=10)
    images = load_images(run_for(tmp_path, val_fraction=0.3, train_size=9, val_size=4, seed=3))
    train, val = (
        [f"{path.parent.name}{path.stem}" for path in split.images]
        for split in (images.train, images.validation)
    )
    assert train == ["cat4", "cat1", "cat2", "dog3", "dog9", "cat7", "dog8", "dog4", "dog2"]
    assert val == ["dog7", "cat3", "dog5", "cat0"]


def test_files_that_are_no_images_by_their_names_are_counted(tmp_path):
    make_images(tmp_path, CLASSES)
    for name in ("a.gif", "b.GIF", "notes.txt", "LICENSE", ".hidden.txt"):
        (tmp_path / "cat" / name).write_bytes(b"")
    run = run_for(tmp_path, val_fraction=0.5)
    assert load_images(run).notes == (
        f"{tmp_path}: ignored 4 files: .gif 2, .txt 1, without a suffix 1",
    )
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "c.gif").write_bytes(b"")
    words = refused(run)
    assert f"{tmp_path / 'emu'} has no image that can be used; ignored 1 file: .gif 1" in words
    assert ".png" in words


def test_evaluate_tells_what_it_left_out_and_which_class_has_no_images(tmp_path, capsys):
    root = split_folder(tmp_path / "data", {"train": 3, "val": 3})
    path = save(tmp_path / "x.ckpt", run_for(root))
    shutil.rmtree(root / "val" / "dog")
    bad = root / "val" / "cat" / "0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    (root / "val" / "cat" / "a.gif").write_bytes(b"")
    told, text = measure(path, tmp_path / "out", corrupt="skip")
    changed, chose, *notes = told["notes"]
    assert "some have come, gone or changed" in changed
    assert "chose the epoch" in chose
    assert notes[0].startswith(f"skipped {bad}: ")
    assert notes[1:] == [
        f"{root / 'val'}: ignored 1 file: .gif 1",
        f"{root / 'val'} has no images of dog",
    ]
    assert all(f"\n  {note}\n" in text for note in told["notes"])
    assert text in capsys.readouterr().out
    assert count(told) == 2
    assert told["classes"]["dog"]["recall"] is None
    assert told["classes"]["cat"]["recall"] is not None
    (row,) = (
        line.split() for line in text.splitlines() if line.startswith("dog  ") and "." in line
    )
    assert row[2:] == ["\N{EN DASH}", "0"]
    # Training says the same of the images that it is validated on.
    notes = load_images(run_for(root, corrupt="skip")).notes
    assert f"{root / 'val'} has no images of dog" in notes


def test_a_class_folder_is_not_called_empty(tmp_path):
    make_images(tmp_path, CLASSES)
    run = run_for(tmp_path, val_fraction=0.5)
    words = said(load_split, run, None, CLASSES, str(tmp_path / "cat"))
    assert "has images but no folders" in words
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"")
    assert "has no folders" in said(load_split, run, None, CLASSES, str(tmp_path / "text"))
    (tmp_path / "text" / "a.txt").unlink()
    assert "is empty" in said(load_split, run, None, CLASSES, str(tmp_path / "text"))


def test_what_is_no_checkpoint_is_said_without_torch_s_advice(tmp_path):
    path = tmp_path / "six.py"
    path.write_text("import sys\n\nPY3 = sys.version_info[0] == 3\n")
    classifier = Classifier(Run(), CLASSES)
    for words in (said(load_weights, classifier, str(path)), said(load_classifier, path)):
        assert words.startswith(f"{path} holds no weights")
        assert "it is no checkpoint" in words
        assert "weights_only" not in words
        assert "Weights only" not in words
