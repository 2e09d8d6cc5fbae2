"""What a run measures and keeps, and that it trains as its settings say.

The two classes of these images are told apart by their tone within a few steps, so that a network
is measured that has learned. The splits' labels differ: a figure tells which split it is of.
"""

import contextlib
import csv
import io
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import Callback
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from resnet_reg_ext import TargetSparsity, cli
from resnet_reg_ext.recipe.loaders import EpochBatches
from resnet_reg_ext.recipe.model import Classifier
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16
CLASSES = ("dark", "light")
DARK, LIGHT = 70, 180
# By split and class, the tones of the images. In val/ most labels are wrong, so that the loss there
# rises as the network learns; the classes are of other sizes, so that means over images and over
# classes differ.
TONES = {
    "train": ([DARK] * 24, [LIGHT] * 24),
    "val": ([DARK] * 2 + [LIGHT] * 4, [DARK] * 4),
    "test": ([DARK] * 3, [LIGHT] * 4),
}
# The loss of float32 logits against that of float64 ones.
CLOSE = {"rel": 1e-3, "abs": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/, val/ and test/, of a size that needs no resizing."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, tones_by_class in TONES.items():
        for name, tones in zip(CLASSES, tones_by_class, strict=True):
            (root / split / name).mkdir(parents=True)
            for i, tone in enumerate(tones):
                pixels = tone + random.integers(-40, 41, (SIZE, SIZE, 3))
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / split / name / f"{i:02}.png")
    return root


class Record(Callback):
    """What the network is trained on and with, step by step."""

    def __init__(self):
        self.batches, self.groups, self.schedules = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.schedules = [config.scheduler for config in trainer.lr_scheduler_configs]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append([part.clone() for part in batch])
        names = ("lr", "momentum", "l1", "weight_decay")
        groups = trainer.optimizers[0].param_groups
        self.groups.append([{name: float(group[name]) for name in names} for group in groups])


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """A run that early stopping ended: its result, output folder, record and what it printed."""
    run = Run(
        data=str(folder),
        image_size=SIZE,
        batch_size=8,
        augment="shift",
        # None of these is a default, of the recipe or of ProxSGD.
        seed=3,
        lr=0.015,
        momentum=0.8,
        l1=2e-4,
        weight_decay=3e-3,
        epochs=6,
        evaluate_every=1,
        early_stopping=2,
        accelerator="cpu",
    )
    out, record = tmp_path_factory.mktemp("learned") / "run", Record()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = train(run, out, callbacks=[record])
    # Otherwise the tests below would say little.
    assert result.last["train_accuracy"] > 0.9
    return result, out, record, printed.getvalue()


@pytest.fixture(scope="module")
def steered(folder, tmp_path_factory):
    """A short run in double precision whose l1 is steered, of 8 steps, and its record."""
    run = Run(
        data=str(folder),
        image_size=SIZE,
        train_size=8,
        batch_size=4,
        l1=1e-3,
        target_sparsity=0.6,
        epochs=4,
        evaluate_every=3,
        precision="64-true",
        accelerator="cpu",
    )
    out, record = tmp_path_factory.mktemp("steered") / "run", Record()
    return train(run, out, keep="weights", callbacks=[record]), out, record


def images_of(folder):
    """Images (count, 3, h, w) as ImageNet's are scaled, in float64, and labels; in order."""
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).iterdir()):
            pixels = np.asarray(Image.open(path)) / 255
            pixels = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
            images.append(pixels.transpose(2, 0, 1))
            labels.append(label)
    return torch.tensor(np.stack(images)), np.array(labels)


def measured(checkpoint, folder):
    """A checkpoint on a split, measured without the package, in float64."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = torchvision.models.resnet50(num_classes=len(CLASSES)).double().eval()
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    images, labels = images_of(folder)
    with torch.no_grad():
        logits = model(images).numpy()
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    predicted = logits.argmax(1)
    return {
        "accuracy": accuracy_score(labels, predicted),
        "loss": -np.log(shares[range(len(labels)), labels]).mean(),
        "f1": f1_score(labels, predicted, average="macro"),
        "confusion": confusion_matrix(labels, predicted).tolist(),
    }


def test_what_a_run_reports_is_what_its_checkpoint_does_on_train_and_val(learned, folder):
    result, out, _, printed = learned
    with next(out.glob("csv/*/metrics.csv")).open() as file:
        logged = [row for row in csv.DictReader(file) if row["validation_loss"]][-1]
    found = {}
    for name, split in (("train", "train"), ("validation", "val")):
        found[name] = measured(out / "last.ckpt", folder / split)
        for metric in ("accuracy", "loss", "f1"):
            value = pytest.approx(found[name][metric], **CLOSE)
            assert result.last[f"{name}_{metric}"] == value
            assert float(logged[f"{name}_{metric}"]) == value
    on_test = measured(out / "last.ckpt", folder / "test")
    assert result.confusion == on_test["confusion"]
    for metric in ("accuracy", "loss", "f1"):
        value = pytest.approx(on_test[metric], **CLOSE)
        assert result.last[f"test_{metric}"] == result.last[f"held_out_{metric}"] == value
    assert result.last["gap"] == result.last["train_accuracy"] - result.last["test_accuracy"]
    assert sum(result.test.right) == sum(on_test["confusion"][c][c] for c in range(2))
    # The figures could not have been taken for each other.
    train_accuracy, accuracy, f1 = (
        found["train"]["accuracy"],
        found["validation"]["accuracy"],
        found["validation"]["f1"],
    )
    assert len({round(value, 2) for value in (train_accuracy, accuracy, f1)}) == 3
    line = re.findall(
        r"epoch \d+: accuracy (.*) train, (.*) validation; validation loss (.*); zeros", printed
    )
    assert line[-1][:2] == (f"{train_accuracy:.3f}", f"{accuracy:.3f}")
    # Rounded to three digits.
    assert float(line[-1][2]) == pytest.approx(found["validation"]["loss"], rel=1e-3, abs=5e-4)


def test_best_ckpt_is_of_the_lowest_validation_loss(learned, folder):
    result, out, _, _ = learned
    losses = [row["validation_loss"] for row in result.history]
    assert max(losses) > 1.1 * min(losses)
    assert losses[-1] != min(losses)
    found = measured(out / "best.ckpt", folder / "val")["loss"]
    assert found == pytest.approx(min(losses), **CLOSE)
    # What is told of a run that was to stop early is what its best weights do.
    early, on_test = result.reported, measured(out / "best.ckpt", folder / "test")
    assert early.last["epoch"] == result.best.epoch == 1 + losses.index(min(losses))
    assert early.last["validation_loss"] == min(losses)
    assert early.confusion == on_test["confusion"]
    assert early.last["test_loss"] == pytest.approx(on_test["loss"], **CLOSE)
    assert early.last["test_loss"] != result.last["test_loss"]


class Away(Callback):
    """The test images are elsewhere while there is anything that could be chosen by them."""

    def __init__(self, folder):
        self.here, self.away = folder / "test", folder / "away"

    def on_fit_start(self, *_):
        self.here.rename(self.away)

    def on_fit_end(self, *_):
        self.away.rename(self.here)


def test_nothing_is_chosen_by_the_test_images(learned, folder, tmp_path):
    """The run whose test images can't be read until its end is the same, epoch by epoch."""
    result, _, _, _ = learned
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    run = replace(result.run, data=str(root))
    again = train(run, tmp_path / "out", callbacks=[Away(root)])
    assert again.history == result.history
    assert again.best == result.best
    assert again.test == result.test


def test_early_stopping_waits_as_long_as_asked_for_a_lower_validation_loss(learned):
    result, _, _, _ = learned
    losses = [row["validation_loss"] for row in result.history]
    lowest = losses.index(min(losses))
    assert len(losses) == lowest + 1 + result.run.early_stopping < result.run.epochs
    # The training loss went on falling meanwhile.
    assert result.history[-1]["train_loss"] < result.history[lowest]["train_loss"]


def test_the_optimizer_gets_the_settings_of_the_run(learned):
    result, _, record, _ = learned
    run = result.run
    weights, others = record.groups[0]
    assert weights == {
        "lr": run.lr,
        "momentum": run.momentum,
        "l1": run.l1,
        "weight_decay": run.weight_decay,
    }
    # Norms and biases.
    assert others == {**weights, "l1": 0, "weight_decay": 0}


def test_the_learning_rate_falls_along_a_cosine_over_all_epochs(learned):
    result, _, record, _ = learned
    steps = 6 * result.run.epochs
    assert len(record.groups) == 6 * len(result.history) >= 18
    for step, groups in enumerate(record.groups):
        lr = result.run.lr * (1 + math.cos(math.pi * step / steps)) / 2
        # torch goes from one to the next, which rounds.
        assert [group["lr"] for group in groups] == pytest.approx([lr, lr], rel=1e-9)


def test_training_sees_shifted_images_in_the_order_of_the_seed(learned, folder):
    result, _, record, _ = learned
    plain, labels = images_of(folder / "train")
    reach = SIZE // 8
    padded = torch.nn.functional.pad(plain, (reach,) * 4, mode="replicate")
    shifts = [(y, x) for y in range(2 * reach + 1) for x in range(2 * reach + 1)]
    order = EpochBatches(len(labels), result.run.batch_size, seed=result.run.seed)
    keys = []
    for epoch in range(len(result.history)):
        order.set_epoch(epoch)
        keys += order
    seen = []
    for (images, truth), batch in zip(record.batches, keys, strict=True):
        for image, label, (row, _) in zip(images, truth, batch, strict=True):
            assert label == labels[row]
            windows = torch.stack([padded[row, :, y : y + SIZE, x : x + SIZE] for y, x in shifts])
            off = (windows - image).abs().amax((1, 2, 3))
            assert off.min() < 1e-5  # float32 against float64
            seen.append(shifts[off.argmin()])
    # At least 144 draws of 25 shifts.
    assert len(set(seen)) > 15


def test_evaluate_takes_test_where_there_is_one(learned, folder, tmp_path, capsys):
    _, out, _, _ = learned
    checkpoint = out / "last.ckpt"
    accuracies = set()
    for options, split, count in (([], "test", 7), (["--split", "val"], "val", 10)):
        arguments = ["evaluate", str(checkpoint), *options, "--out", str(tmp_path / split)]
        assert cli.main(arguments) == 0
        known = measured(checkpoint, folder / split)
        said = f"accuracy {known['accuracy']:.3f} on {count} images of {folder} ({split})"
        assert said in capsys.readouterr().out
        told = json.loads((tmp_path / split / "evaluation.json").read_text())
        assert told["split"] == split
        assert told["confusion"] == known["confusion"]
        accuracies.add(known["accuracy"])
    assert len(accuracies) == 2


def test_evaluations_come_as_often_as_asked_and_after_the_last_epoch(steered):
    result, _, _ = steered
    # 3 is lowered to 2, which divides the 4 epochs.
    assert [row["epoch"] for row in result.history] == [2, 4]


def test_a_run_has_the_precision_asked_for(steered, learned):
    for (_, out, record, *_), dtype in ((steered, torch.float64), (learned, torch.float32)):
        state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
        assert state["model.conv1.weight"].dtype == dtype
        assert {images.dtype for images, _ in record.batches} == {dtype}


def test_the_share_of_zeros_is_due_after_80_percent_of_the_steps(steered, learned):
    result, _, record = steered
    assert len(record.batches) == 8
    (steering,) = (s for s in record.schedules if isinstance(s, TargetSparsity))
    assert steering.steps == 6
    assert steering.target == result.run.target_sparsity
    # Without a target l1 stays.
    assert {groups[0]["l1"] for groups in learned[2].groups} == {learned[0].run.l1}


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(7)
    first = Classifier(Run(seed=1), CLASSES).state_dict()
    torch.manual_seed(8)
    again = Classifier(Run(seed=1), CLASSES).state_dict()
    other = Classifier(Run(seed=2), CLASSES).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("model.conv1.weight", "model.fc.weight"):
        assert not torch.equal(first[name], other[name])
