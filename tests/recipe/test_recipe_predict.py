"""Predictions of single images, and what an evaluation tells beside its accuracy."""

import csv
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from sklearn.metrics import f1_score, log_loss
from test_recipe_data import make_images, run_for
from test_recipe_input import measure, save, split_folder

from resnet_reg_ext import cli
from resnet_reg_ext.recipe import intervals
from resnet_reg_ext.recipe.images import load_image
from resnet_reg_ext.recipe.loaders import transform
from resnet_reg_ext.recipe.model import load_classifier
from resnet_reg_ext.recipe.predictions import load_mistakes

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

CLASSES = ["cat", "dog, large"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A new network for two classes, and the folder it was made for: train/, val/ and test/."""
    root = tmp_path_factory.mktemp("network")
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 6), ("test", 4)):
        make_images(root / "data" / split, CLASSES, count=count)
        for path in sorted((root / "data" / split).rglob("*.png")):
            Image.fromarray(generator.integers(0, 255, (20, 14, 3), dtype=np.uint8)).save(path)
    run = run_for(root / "data", image_size=16)
    return save(root / "best.ckpt", run), root / "data"


def probabilities(checkpoint, paths):
    """What the network says of images, without the recipe's loaders."""
    classifier = load_classifier(checkpoint)
    change = transform(classifier.run.image_size, "none")
    with torch.inference_mode():
        return classifier(torch.stack([change(load_image(path)) for path in paths])).softmax(1)


def test_predict_writes_csv_or_json_and_passes_over_what_it_cannot_read(
    network, tmp_path, capsys, monkeypatch
):
    checkpoint, data = network
    folder = tmp_path / "new"
    shutil.copytree(data / "val", folder)
    (folder / "cat" / "broken.png").write_bytes(b"nothing")
    (folder / "notes.txt").write_text("no image")
    named = tmp_path / "named\n.dat"  # a file that is named is taken whatever its suffix
    shutil.copy(data / "val" / "cat" / "0.png", named)
    Image.new("I;16", (9, 9)).save(tmp_path / "deep.png")
    arguments = ["predict", str(checkpoint), str(folder), str(named), str(tmp_path / "deep.png")]
    good = [*sorted(folder.rglob("[0-9].png")), named]
    expected = probabilities(checkpoint, good)

    assert cli.main(arguments) == 1
    out, error = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["image"] for row in rows] == [str(path).replace("\n", "\\n") for path in good]
    for row, shares in zip(rows, expected.tolist(), strict=True):
        best = CLASSES[int(np.argmax(shares))]
        assert row["predicted"] == best
        assert float(row["probability"]) == pytest.approx(max(shares), rel=1e-4)
        for name, share in zip(CLASSES, shares, strict=True):
            assert float(row[f"p({name})"]) == pytest.approx(share, rel=1e-4)
    assert f"passed over {folder / 'cat' / 'broken.png'}: cannot identify" in error
    assert "deep.png: its pixels have more than 8 bits" in error
    assert "2 of 15 images passed over" in error
    assert "15/15" in error  # the bar

    written = tmp_path / "p.json"
    again = [*arguments[:-1], "--out", str(written), "--workers", "1"]
    assert cli.main(again) == 1
    told = json.loads(written.read_text())
    assert [item["image"] for item in told] == [row["image"] for row in rows]
    assert [str(item["probability"]) for item in told] == [row["probability"] for row in rows]
    assert list(told[0]["probabilities"]) == CLASSES
    before = written.read_bytes()
    assert cli.main(again) == 2
    assert f"--out {written} is there already" in capsys.readouterr().err
    assert written.read_bytes() == before
    assert cli.main([*again, "--overwrite", "--format", "csv"]) == 1
    assert written.read_text() == "".join(
        line for line in out.splitlines(True) if not line.startswith(str(tmp_path / "deep"))
    )


def test_predict_answers_bad_input_with_one_sentence(network, tmp_path, capsys):
    checkpoint, data = network
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([checkpoint, tmp_path / "none.png"], "none.png is neither a file nor a folder"),
        ([checkpoint, tmp_path / "empty"], "has no images: they end in .jpg"),
        ([data / "val" / "cat" / "0.png", data], "holds no weights"),
        ([checkpoint], "the following arguments are required: IMAGES"),
        ([checkpoint, data, "--out", tmp_path / "no" / "x.csv"], "there is no folder"),
    ):
        assert cli.main(["predict", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert cli.main(["predict", str(checkpoint), str(data / "test")]) == 0


def test_evaluate_tells_loss_f1_and_each_image(network, tmp_path):
    checkpoint, data = network
    told, text = measure(checkpoint, tmp_path, split="val")
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open(newline="")))
    paths = [row["image"] for row in rows]
    assert sorted(paths) == sorted(map(str, (data / "val").rglob("*.png")))
    shares = probabilities(checkpoint, map(Path, paths)).double().numpy()
    truth = [CLASSES.index(row["true"]) for row in rows]
    assert [CLASSES.index(path.split("/")[-2]) for path in paths] == truth
    guess = shares.argmax(1)
    assert [CLASSES.index(row["predicted"]) for row in rows] == guess.tolist()
    assert told["images"] == 12
    assert told["accuracy"] == pytest.approx((guess == truth).mean())
    assert told["loss"] == pytest.approx(log_loss(truth, shares), rel=1e-4)
    assert told["f1"] == pytest.approx(f1_score(truth, guess, average="macro"), rel=1e-5)
    for name in ("accuracy", "loss", "f1"):
        low, high = told["intervals"][name]
        assert low <= told[name] <= high
        assert f"{told[name]:.3f}  ({low:.3f} to {high:.3f} at 95 %)" in text
    # The most confident mistakes, with a picture each.
    mistakes = load_mistakes(tmp_path)
    wrong = [row for row in rows if row["true"] != row["predicted"]]
    assert {m.image for m in mistakes} == {row["image"] for row in wrong}
    confidence = [m.probability for m in mistakes]
    assert confidence == sorted(confidence, reverse=True)
    assert all(m.thumbnail.startswith("data:image/png;base64,") for m in mistakes)


def test_an_evaluation_is_not_replaced_unasked(network, tmp_path, capsys):
    checkpoint, _ = network
    arguments = ["evaluate", str(checkpoint), "--out", str(tmp_path), "--test-size", "4"]
    assert cli.main(arguments) == 0
    assert "on 4 images" in capsys.readouterr().out
    before = (tmp_path / "evaluation.json").read_bytes()
    assert cli.main([*arguments[:-1], "6"]) == 2
    assert "holds evaluation.json already: give another --out, or" in capsys.readouterr().err
    assert (tmp_path / "evaluation.json").read_bytes() == before
    # Nor are files of others.
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "confusion.png").write_bytes(b"mine")
    assert cli.main([*arguments[:3], str(tmp_path / "compare")]) == 2
    assert "holds confusion.png already" in capsys.readouterr().err
    assert cli.main([*arguments[:-1], "6", "--overwrite"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 6
    assert cli.main([*arguments[:-1], "9", "--overwrite"]) == 2
    assert "--test-size 9 is more than the 8 images there are" in capsys.readouterr().err


def test_evaluate_says_which_images_trained_and_chose_the_network(network, tmp_path):
    checkpoint, data = network
    last = shutil.copy(checkpoint, tmp_path / "last.ckpt")
    out = tmp_path / "e"
    assert measure(checkpoint, out)[0]["notes"] == []
    (note,) = measure(checkpoint, out, split="val")[0]["notes"]
    assert note.startswith("these images chose the epoch of this checkpoint")
    assert measure(last, out, split="val")[0]["notes"] == []
    (note,) = measure(checkpoint, out, split="train")[0]["notes"]
    assert note.startswith("these images trained the network")
    # The same images, moved: they are known by their contents.
    moved = shutil.copytree(data, tmp_path / "moved")
    assert "chose" in measure(checkpoint, out, data=str(moved), split="val")[0]["notes"][0]
    # Other images, and those of the run after a change.
    (moved / "val" / "cat" / "0.png").unlink()
    assert measure(checkpoint, out, data=str(moved), split="val")[0]["notes"] == []


def test_evaluate_says_that_folders_for_splits_have_changed(tmp_path):
    data = split_folder(tmp_path / "data", {"train": 3, "val": 3, "test": 2})
    path = save(tmp_path / "best.ckpt", run_for(data))
    assert measure(path, tmp_path / "e", split="test")[0]["notes"] == []
    shutil.copy(data / "train" / "cat" / "0.png", data / "val" / "dog" / "new.png")
    for split in ("val", "test"):
        told, text = measure(path, tmp_path / "e", split=split)
        assert told["notes"][0].startswith(f"{data}: the images are not what they were")
        assert "come, gone or changed" in text
    shutil.rmtree(data / "train")  # test can be measured all the same
    told, _ = measure(path, tmp_path / "e", split="test")
    assert "come, gone or changed" in told["notes"][0]


def test_of_the_digits_those_for_validation_chose_the_checkpoint(tmp_path):
    sizes = {"train_size": 20, "val_size": 20, "test_size": 20}
    path, out = save(tmp_path / "best.ckpt", run_for("digits", **sizes)), tmp_path / "e"
    assert measure(path, out)[0]["notes"] == []
    (note,) = measure(path, out, split="val")[0]["notes"]
    assert "chose the epoch" in note
    without_test = {**sizes, "test_size": 0, "early_stopping": 2}
    path = save(tmp_path / "last.ckpt", run_for("digits", **without_test))
    assert "when training stopped" in measure(path, out)[0]["notes"][0]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("count", [20, 200])
def test_the_interval_of_a_share_covers_it(share, count):
    """Exactly, over the binomial distribution: at least 93 % (Agresti and Coull: near 95)."""
    covered = 0.0
    for right in range(count + 1):
        low, high = intervals.of_share(right, count)
        covered += binom.pmf(right, count, share) * (low <= share <= high)
    assert covered >= 0.93


def test_the_intervals_of_loss_and_f1():
    generator = np.random.default_rng(1)
    values = generator.exponential(size=400)
    low, high = intervals.of_mean(values.tolist())
    error = values.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 2 * error, values.mean() + 2 * error))
    assert intervals.of_mean([1.0]) is None
    assert intervals.of_mean([1.0, math.inf]) is None
    # Against scikit-learn on images drawn anew.
    truth = generator.integers(0, 4, 300)
    guess = np.where(generator.random(300) < 0.6, truth, generator.integers(0, 4, 300))
    matrix = np.zeros((4, 4), dtype=int)
    np.add.at(matrix, (truth, guess), 1)
    low, high = intervals.of_macro_f1(matrix.tolist())
    scores = []
    for _ in range(600):
        rows = generator.integers(0, 300, 300)
        scores.append(f1_score(truth[rows], guess[rows], average="macro"))
    # Two bootstraps of so many draws differ by about a tenth of the interval's width.
    width = np.quantile(scores, 0.975) - np.quantile(scores, 0.025)
    assert abs(low - np.quantile(scores, 0.025)) < 0.25 * width
    assert abs(high - np.quantile(scores, 0.975)) < 0.25 * width
    assert intervals.of_macro_f1([[1, 0], [0, 0]]) is None
