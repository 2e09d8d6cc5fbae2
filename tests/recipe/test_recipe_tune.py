"""Strengths: what an l1 is foretold to do, warnings, the search for the best, and its files."""

import json
import math
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_recipe_data import make_images
from test_recipe_runs import SHORT, Signal

from resnet_reg_ext import cli
from resnet_reg_ext.recipe import forecast
from resnet_reg_ext.recipe.callbacks import Stopped
from resnet_reg_ext.recipe.model import Classifier
from resnet_reg_ext.recipe.results import Result
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.train import train
from resnet_reg_ext.recipe.trials import Trial, choose
from resnet_reg_ext.recipe.tune import Budget, order, tune
from resnet_reg_ext.sparsity import sparsity

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")


def options_of(run):
    names = ("image_size", "train_size", "val_size", "test_size", "batch_size", "epochs")
    return [f"--{n.replace('_', '-')}={getattr(run, n)}" for n in (*names, "accelerator")]


# What is foretold


def test_travel_is_how_far_a_constant_gradient_moves_a_weight():
    """Momentum included; the rest of the last velocities is still to come at the end."""
    for run in (Run(lr=0.1, momentum=0.5), Run(lr=0.1, momentum=0.0, warmup=4.0)):
        steps = 400
        weight = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=run.lr, momentum=run.momentum)
        lrs = [
            run.lr * (1 + math.cos(math.pi * step / steps)) / 2 if not run.warmup else None
            for step in range(steps)
        ]
        if run.warmup:  # over 80 of the steps
            lrs = [run.lr * (1 + step * 80 / 81) / 81 for step in range(80)]
            lrs = [run.lr * (1 / 81 + (1 - 1 / 81) * step / 80) for step in range(80)]
            lrs += [run.lr * (1 + math.cos(math.pi * step / 320)) / 2 for step in range(320)]
        for lr in lrs:
            optimizer.param_groups[0]["lr"] = lr
            weight.grad = torch.ones(1)
            optimizer.step()
        assert forecast.travel(run, steps) == pytest.approx(-weight.item(), rel=0.02)


def test_weights_without_a_gradient_become_zero_as_foretold(tmp_path):
    """With a learning rate so low that the loss moves nothing, and an l1 so large that L1 does."""
    run = replace(SHORT, lr=1e-9, l1=2e6, epochs=8, momentum=0.5, evaluate_every=8)
    classifier = Classifier(run, [str(digit) for digit in range(10)])
    ahead = forecast.forecast(classifier, 8)
    assert 0.05 < ahead.share < 0.95
    result = train(run, tmp_path / "out", keep="weights")
    # Momentum still has some of the last steps' shrinkage to come.
    assert result.last["zeros"] == pytest.approx(ahead.share, rel=0.02)
    for name, share in ahead.by_layer.items():
        assert result.zeros_by_layer[name] == pytest.approx(share, abs=0.05)


def test_the_default_l1_reaches_a_third_of_the_weights():
    classifier = Classifier(replace(SHORT, weights="x"), ["a", "b"])
    run = forecast.default_strengths(classifier, 100)
    share = forecast.forecast(Classifier(run, ["a", "b"]), 100).share
    assert share == pytest.approx(1 / 3, abs=0.01)
    assert math.exp(-run.weight_decay * forecast.travel(run, 100)) == pytest.approx(0.9, abs=0.01)


# What is warned of


def test_a_run_is_told_what_its_l1_will_do_and_that_it_has_wiped_layers(tmp_path, capsys):
    classifier = Classifier(SHORT, [str(digit) for digit in range(10)])
    torch.save(classifier.model.state_dict(), tmp_path / "w.pt")
    options = [*options_of(SHORT), "--weights", str(tmp_path / "w.pt"), "--lr", "0.01"]
    assert cli.main(["train", *options, "--l1", "50", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "l1 50 reaches 100.0% of the initial weights" in said
    assert "warning: this l1 is about to wipe conv1.weight, layer1.0.conv1.weight" in said
    assert "wholly zero after epoch" in said
    assert "all weights are zero in conv1.weight" in said
    assert "can't be told from guessing; give a smaller --l1, or more --epochs" in said
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"]
    assert not state["model.conv1.weight"].any()


def test_a_target_that_ends_at_chance_is_not_passed_over(tmp_path, capsys):
    run = replace(SHORT, l1=1.0, target_sparsity=0.99, augment="standard", evaluate_every=1)
    train(run, tmp_path / "out", keep="weights")
    said = capsys.readouterr().out
    assert "epochs the validation accuracy" in said
    assert "can't be told from guessing; give a lower --target-sparsity, or more --epochs" in said


@pytest.mark.parametrize(
    ("accuracy", "counts", "chance"),
    [
        (0.1, [100] * 10, True),
        (0.2, [100] * 10, False),
        (0.8, [80, 20], True),
        (1.0, [9, 9], False),
    ],
)
def test_chance_is_the_share_of_the_commonest_class(accuracy, counts, chance):
    assert forecast.at_chance(accuracy, counts) == chance


# The search


def trial(place, loss, error=0.1, name="L1"):
    return Trial(name, place, 10.0**place, 0.0, loss, error, 0.5, 0.0, 1.0)


def test_the_rule_takes_the_strongest_within_one_standard_error_of_the_lowest():
    none = trial(-1, 1.2, name="none")
    losses = [1.1, 1.0, 1.05, 1.09, 1.3, math.inf]
    trials = [none, *(trial(place, loss) for place, loss in enumerate(losses))]
    assert choose(trials, "1se").place == 3
    assert choose(trials, "best").place == 1
    # The run without a penalty sets the mark too, and is none of the strengths.
    assert choose([trial(-1, 0.5, name="none"), *trials[1:]], "1se").place == 1
    assert choose([trial(-1, 1.0, 0.15, name="none"), *trials[1:]], "1se").place == 3


@pytest.mark.parametrize("points", [2, 3, 5, 8])
def test_the_middle_and_the_ends_are_tried_first(points):
    assert sorted(order(points, warm=False)) == order(points, warm=True) == [*range(points)]
    first = order(points, warm=False)[:3]
    assert set(first) >= {0, points - 1}


@dataclass(frozen=True)
class Searched:
    """A search that its budget ended, in a folder of images, and what it said."""

    root: Path
    run: Run
    trials: list[dict[str, Any]]
    said: str


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    root = tmp_path_factory.mktemp("searched")
    for split in ("train", "val", "test"):
        make_images(root / "data" / split, ["a", "b"], count=6, size=8)
    run = replace(SHORT, data=str(root / "data"), epochs=1, train_size=None, val_size=None)
    run = replace(run, test_size=None, batch_size=4, seed=1, evaluate_every=1)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        patch.chdir(root)
        arguments = ["tune", "--data", "data", "--image-size=8", "--batch-size=4", "--epochs=1"]
        arguments += ["--seed=1", "--points=2", "--steps=20", "--accelerator=cpu", "--out=tune"]
        assert cli.main(arguments) == 0
    trials = json.loads((root / "tune" / "tune.json").read_text())["trials"]
    return Searched(root, run, trials, said.getvalue())


def without_times(trials):
    return [{**trial, "seconds": 0} for trial in trials]


def test_a_search_stops_resumes_and_writes_what_train_and_compare_take(searched):
    root, run, said = searched.root, searched.run, searched.said
    out = root / "tune"
    # 3 steps a run: none, three that must be, and two more.
    assert "the budget ends here, with 6 of 7 runs made" in said
    told = json.loads((out / "tune.json").read_text())
    assert len(told["trials"]) == 6
    for name, chosen in told["chosen"].items():
        option = ["--config", str(out / f"tuned-{name.replace(' ', '-')}.yaml")]
        content = yaml.safe_load((out / option[1]).read_text())
        assert (content["l1"], content["weight_decay"]) == (chosen["l1"], chosen["weight_decay"])
    report = (out / "report.html").read_text()
    assert "12 training images, 12 validation images, no test images" in report
    assert "the strongest penalty whose validation loss" in report
    assert [name for name in ("none", "L2", "L1", "elastic net") if f">{name}<" not in report] == []
    assert not list(out.rglob("*.ckpt"))
    assert all(Result.load(folder).test is None for folder in out.iterdir() if folder.is_dir())
    # What is finished is not made again; more budget goes on where it ended.
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    again = tune(run, Budget(points=2), out, resume=True)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert len(list(out.glob("*/result.json"))) == 7
    assert set(again) == {"L2", "L1", "elastic net"}
    assert (
        cli.main(
            ["compare", "--config", str(out / "tuned-compare.yaml"), "--out", str(root / "compare")]
        )
        == 0
    )
    runs = json.loads((root / "compare" / "compare.json").read_text())["runs"]
    for name, (l1, weight_decay) in again.items():
        (made_run,) = runs[name]
        assert (made_run["run"]["l1"], made_run["run"]["weight_decay"]) == (l1, weight_decay)
        assert len(made_run["test"]["right"]) == 12


def test_a_tuned_comparison_chooses_without_the_test_images(searched, tmp_path, capsys):
    """The search is made again with other test images, whose labels are all wrong."""
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "val", "test"):
        names = ["b", "a"] if split == "test" else ["a", "b"]
        make_images(data / split, names, count=6, size=8)
    arguments = ["compare", "--tune", f"--data={data}", "--image-size=8", "--batch-size=4"]
    arguments += ["--epochs=1", "--seed=1", "--points=2", "--steps=1", "--accelerator=cpu"]
    assert cli.main([*arguments, f"--out={out}"]) == 0
    told = json.loads((out / "tune" / "tune.json").read_text())
    assert len(told["trials"]) == 4
    assert without_times(told["trials"]) == without_times(searched.trials[:4])
    # Each arm has its own strength, and was measured on the test images at its end.
    runs = json.loads((out / "compare.json").read_text())["runs"]
    for name, chosen in told["chosen"].items():
        (result,) = runs[name]
        strengths = (chosen["l1"], chosen["weight_decay"])
        assert (result["run"]["l1"], result["run"]["weight_decay"]) == strengths
        assert len(result["test"]["right"]) == 12
    # What is finished is told again.
    capsys.readouterr()
    assert cli.main(["compare", "--resume", str(out)]) == 0
    assert "[1 of" not in capsys.readouterr().out


def test_a_warm_search_starts_each_strength_from_the_one_before(searched, tmp_path, capsys):
    tune(searched.run, Budget(points=2, steps=1), tmp_path / "out", warm=True, resume=False)
    said = capsys.readouterr().out
    assert f"initial weights: {tmp_path / 'out' / 'none' / 'last.ckpt'}, with its class" in said


def test_a_search_stops_at_a_signal_and_goes_on(searched, tmp_path, monkeypatch):
    def signalled(run, folder, **options):
        return train(run, folder, **options, callbacks=[Signal(2, 2)])

    out = tmp_path / "out"
    monkeypatch.setattr("resnet_reg_ext.recipe.compare.train", signalled)
    with pytest.raises(Stopped) as stopped:
        tune(searched.run, Budget(points=2, steps=1), out, resume=False)
    monkeypatch.undo()
    assert stopped.value.folder == out
    assert (out / "none" / "last.ckpt").is_file()
    assert cli.main(["tune", "--resume", str(out)]) == 0
    again = json.loads((out / "tune.json").read_text())["trials"]
    assert without_times(again) == without_times(searched.trials[:4])


# What is used beside penalties


def test_what_is_used_beside_penalties_resumes_to_the_same_bits(tmp_path):
    """Mixup and dropout draw anew in each step."""
    run = replace(SHORT, mixup=0.4, dropout=0.5, label_smoothing=0.1, class_weights="balanced")
    run = replace(run, warmup=1.0, augment="trivial")
    whole = train(run, tmp_path / "whole", keep="weights")
    torch.manual_seed(99)
    with pytest.raises(Stopped):
        train(run, tmp_path / "out", callbacks=[Signal(15, 2)])
    torch.manual_seed(7)
    assert train(run, tmp_path / "out", resume=True).history == whole.history
    plain = train(replace(run, mixup=0.0, dropout=0.0), tmp_path / "plain", keep="weights")
    assert plain.history != whole.history


def test_the_loss_is_torch_s_with_smoothing_and_balanced_weights():
    run = Run(label_smoothing=0.2, class_weights="balanced", image_size=16)
    weights = torch.tensor([0.5, 2.0])
    classifier = Classifier(run, ["a", "b"], class_weights=weights).eval()
    logged = {}
    classifier.log = lambda name, value, **_: logged.update({name: value})
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    optimizer.param_groups[0]["l1"] = 0.0

    classifier._trainer = SimpleNamespace(optimizers=[optimizer])
    with torch.no_grad():
        loss = classifier.training_step((images, labels), 0)
        logits = classifier.model(images).double()
    # By hand, in float64.
    log_p = logits.log_softmax(1).numpy()
    w, y = weights.double().numpy(), labels.numpy()
    own = -(0.8 * w[y] * log_p[range(4), y] + 0.1 * (log_p * w).sum(1))
    assert loss.item() == pytest.approx(own.sum() / w[y].sum(), rel=1e-5)
    # The weights are no part of what a checkpoint keeps.
    assert "class_weights" not in classifier.state_dict()
    assert np.isfinite(float(logged["loss"]))


def test_dropout_is_before_the_head_and_renames_nothing():
    with_dropout, plain = (Classifier(Run(dropout=d), ["a", "b"]).train() for d in (0.5, 0.0))
    assert with_dropout.state_dict().keys() == plain.state_dict().keys()
    seen = []
    with_dropout.model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with_dropout.model(torch.randn(4, 3, 64, 64))
    assert 0.3 < float((seen[0] == 0).float().mean()) < 0.9
    assert sparsity(with_dropout.model).layers[-1].name == "fc.bias"
