"""How runs stop, go on and are refused, and what their files, plots and verdicts show."""

import csv
import gc
import json
import math
import os
import signal
import weakref
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from resnet_reg_ext import cli
from resnet_reg_ext.recipe import compare
from resnet_reg_ext.recipe.files import RecipeError, Stopped
from resnet_reg_ext.recipe.results import Result
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.train import train
from resnet_reg_ext.recipe.verdicts import table

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

# One step an epoch.
SHORT = Run(
    data="digits",
    image_size=8,
    train_size=10,
    val_size=10,
    test_size=10,
    batch_size=10,
    epochs=4,
    evaluate_every=2,
    accelerator="cpu",
)


class Signal(Callback):
    """Sends this process a signal in the step with this number, counted from 1."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that went through, and its weights."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = train(SHORT, out, keep="weights")
    return result, torch.load(out / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGHUP, 2), (signal.SIGTERM, 4)],
    ids=["not evaluated", "evaluated", "last"],
)
def test_a_signal_stops_after_an_epoch_of_one_step(number, step, whole, tmp_path):
    out = tmp_path / "out"
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=number.name) as stopped:
        train(SHORT, out, keep="weights", callbacks=[Signal(number, step)])
    assert stopped.value.number == number
    assert signal.getsignal(number) is before
    left = torch.load(out / "last.ckpt", weights_only=True)
    assert left["global_step"] == step
    assert not (out / "result.json").exists()
    # It goes on to the bits of the run that went through.
    resumed = train(SHORT, out, keep="weights", resume=True)
    result, weights = whole
    assert resumed.history == result.history
    assert resumed.confusion == result.confusion
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in state)


def test_early_stopping_is_not_undone_by_a_signal(tmp_path):
    """With a learning rate of 0 no loss is lower than the first but for batch norm's statistics."""
    run = replace(SHORT, evaluate_every=1, early_stopping=1, epochs=8, lr=0.0, momentum=0.0)
    went_through = train(run, tmp_path / "whole", keep="weights")
    ended = len(went_through.history)
    assert 2 <= ended < run.epochs
    for step in (ended - 1, ended):
        out = tmp_path / f"{step}"
        with pytest.raises(Stopped):
            train(run, out, keep="weights", callbacks=[Signal(signal.SIGTERM, step)])
        assert train(run, out, keep="weights", resume=True).history == went_through.history


def test_a_finished_run_gives_the_signals_back_and_lets_its_model_go(tmp_path):
    """Lightning's handler of SIGTERM holds the trainer, and so the model."""
    models = []

    class Notes(Callback):
        def on_train_start(self, trainer, pl_module):
            models.append(weakref.ref(pl_module))

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    train(replace(SHORT, epochs=1), tmp_path / "out", keep="result", callbacks=[Notes()])
    assert [signal.getsignal(number) for number in numbers] == before
    gc.collect()
    assert [model() for model in models] == [None]


def test_an_error_gives_the_signals_back_and_closes_the_bar(tmp_path, capsys):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RecipeError("full")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(RecipeError, match="full"):
        train(SHORT, tmp_path / "out", callbacks=[Fails()])
    assert [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ] == before
    # What is printed next has a line of its own.
    assert capsys.readouterr().err.endswith("\n")


def test_compare_stops_where_a_run_gets_a_signal_in_its_last_step(tmp_path, monkeypatch):
    run = replace(SHORT, epochs=1, l1=1e-3, weight_decay=1e-3)
    made = []

    def signalled(run, folder, **options):
        made.append(folder)
        return train(run, folder, **options, callbacks=[Signal(signal.SIGINT, 1)])

    monkeypatch.setattr(compare, "train", signalled)
    with pytest.raises(Stopped) as stopped:
        compare.compare(run, 1, tmp_path / "out")
    assert stopped.value.folder == tmp_path / "out"
    assert len(made) == 1


def test_the_logs_of_a_run_and_of_its_resumption_are_listed(tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        train(SHORT, out, callbacks=[Signal(signal.SIGINT, 2)])
    assert cli.main(["train", "--resume", str(out)]) == 0
    listed = capsys.readouterr().out.partition("Written:\n")[2].split()
    assert all(os.path.exists(path) for path in listed)
    logs = [path for path in listed if path.endswith("metrics.csv")]
    steps = []
    for path in logs:
        with open(path) as file:
            steps.append([int(row["step"]) for row in csv.DictReader(file) if row["loss"]])
    assert steps == [[0, 1], [2, 3]]


def test_result_files_are_json_where_training_diverges(tmp_path):
    class Diverged(Callback):
        """The weights are not finite any more."""

        def on_train_batch_end(self, trainer, module, *_):
            module.model.fc.bias.data.fill_(math.nan)

    run = replace(SHORT, epochs=1)
    result = train(run, tmp_path / "out", keep="weights", callbacks=[Diverged()])
    assert math.isnan(result.last["validation_loss"])
    text = (tmp_path / "out" / "result.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse)["history"][0]["validation_loss"] is None
    again = Result.load(tmp_path / "out")
    assert math.isnan(again.last["validation_loss"])
    assert again.run == run
    # An option that is not given stays so.
    assert again.run.val_fraction is None
    assert table({"run": [again]}) == table({"run": [result]})
    compare._save({"run": [again]}, "", tmp_path, "compare")
    json.loads((tmp_path / "compare.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("processes", [2, 4])
def test_one_image_a_process_is_refused_where_batch_norm_needs_two(processes, tmp_path, capsys):
    command = ["train", "--data", "digits", "--devices", str(processes), "--strategy", "ddp"]
    command += ["--batch-size", str(processes), "--out", str(tmp_path / "out"), "--image-size"]
    # As far as the machine allows: the next thing that is refused are the weights.
    command_on = [*command, "33", "--weights", "/no/where"]
    assert cli.main([*command, "32", "--weights", "/no/where"]) == 2
    error = capsys.readouterr().err
    assert f"--batch-size {processes} leaves one image to each of {processes} processes" in error
    assert "--image-size 32" in error
    assert f"at least {2 * processes} images or 33 pixels" in error
    for fine in (command_on, [*command_on, "--image-size", "32", "--freeze", "layer4"]):
        assert cli.main(["train", *fine[1:], "--accelerator", "cpu"]) == 2
        assert "/no/where is not a file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "values"), [(32, 1), (33, 4)])
def test_from_33_pixels_on_the_last_batch_norm_sees_more_than_one_value(size, values):
    """What the refusal goes by."""
    from torchvision.models import resnet50

    seen = []
    model = resnet50(num_classes=2).eval()
    model.layer4.register_forward_hook(lambda _, inputs, out: seen.append(out[0, 0].numel()))
    model(torch.zeros(1, 3, size, size))
    assert seen == [values]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config"], "expected one argument (resnet-reg train --help)"),
        (["path", "--config"], "expected one argument (resnet-reg path --help)"),
        (["train", "--config", ""], "can't read --config"),
        (["train", "--seed", "-1"], "--seed: must be at least 0 and at most 4294967295, got -1"),
        (["train", "--val-fraction", "0"], "--val-fraction: must be above 0 and below 1, got 0"),
        (["train", "--val-fraction", "1"], "--val-fraction: must be above 0 and below 1, got 1"),
        (["train", "--out", ""], "--out: must name a folder, got ''"),
        (["compare", "--out="], "--out: must name a folder, got ''"),
        (["path", "--resume", ""], "--resume: must name a folder, got ''"),
        (["evaluate", "x.ckpt", "--out", ""], "--out: must name a folder, got ''"),
    ],
)
def test_options_out_of_range_are_named(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
