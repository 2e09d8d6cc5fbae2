"""How runs stop, go on and are refused, and what their files, plots and verdicts show."""

import csv
import itertools
import json
import math
import os
import signal
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from resnet_reg_ext import cli
from resnet_reg_ext.recipe import compare, plots
from resnet_reg_ext.recipe.callbacks import Stopped
from resnet_reg_ext.recipe.files import RecipeError
from resnet_reg_ext.recipe.results import Result
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

# One step an epoch.
SHORT = Run(
    data="digits",
    image_size=8,
    train_size=10,
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
    result = train(SHORT, out, keep_best=False)
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
        train(SHORT, out, keep_best=False, callbacks=[Signal(number, step)])
    assert stopped.value.number == number
    assert signal.getsignal(number) is before
    left = torch.load(out / "last.ckpt", weights_only=True)
    assert left["global_step"] == step
    assert not (out / "result.json").exists()
    # It goes on to the bits of the run that went through.
    resumed = train(SHORT, out, keep_best=False, resume=True)
    result, weights = whole
    assert resumed.history == result.history
    assert resumed.confusion == result.confusion
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in state)


def test_early_stopping_is_not_undone_by_a_signal(tmp_path):
    """With a learning rate of 0 no loss is lower than the first but for batch norm's statistics."""
    run = replace(SHORT, evaluate_every=1, early_stopping=1, epochs=8, lr=0.0, momentum=0.0)
    went_through = train(run, tmp_path / "whole", keep_best=False)
    ended = len(went_through.history)
    assert 2 <= ended < run.epochs
    for step in (ended - 1, ended):
        out = tmp_path / f"{step}"
        with pytest.raises(Stopped):
            train(run, out, keep_best=False, callbacks=[Signal(signal.SIGTERM, step)])
        assert train(run, out, keep_best=False, resume=True).history == went_through.history


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
    logs = [path for path in listed if path.endswith(".csv")]
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
    result = train(run, tmp_path / "out", keep_best=False, callbacks=[Diverged()])
    assert math.isnan(result.last["test_loss"])
    text = (tmp_path / "out" / "result.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse)["history"][0]["test_loss"] is None
    again = Result.load(tmp_path / "out")
    assert math.isnan(again.last["test_loss"])
    assert again.run == run
    # An option that is not given stays so.
    assert again.run.val_fraction is None
    assert compare.table({"run": [again]}) == compare.table({"run": [result]})
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


def results(images, *accuracies, train_accuracy=1.0):
    """A run a seed, of so many test images each."""
    return [
        Result(
            Run(seed=seed),
            {"classes": ["a", "b"], "train_images": 9, "wrong_labels": 0, "test_images": images},
            [
                {
                    "epoch": 1.0,
                    "train_accuracy": train_accuracy,
                    "test_accuracy": accuracy,
                    "train_loss": 0.1,
                    "test_loss": 0.5,
                    "zeros": 0.0,
                }
            ],
            9.0,
            {"conv1.weight": 0.0, "layer1.0.conv1.weight": 0.0},
            [[1, 0], [0, 1]],
            {},
        )
        for seed, accuracy in enumerate(accuracies)
    ]


def interval(images, first, second):
    """Agresti and Caffo's, of a difference of two counts: its centre and half its width."""
    p, q = ((count + 1) / (images + 2) for count in (first, second))
    return q - p, 2 * math.sqrt((p * (1 - p) + q * (1 - q)) / (images + 2))


@pytest.mark.parametrize("images", [2, 3, 10, 50])
def test_a_difference_is_seen_with_one_seed_where_the_interval_leaves_out_0(images):
    seen = set()
    for first in range(images + 1):
        for second in range(images + 1):
            runs = {
                name: results(images, count / images)
                for name, count in (("none", first), ("L1", second))
            }
            (verdict,) = compare.verdicts(runs)
            centre, half = interval(images, first, second)
            if math.isclose(abs(centre), half):
                continue  # rounding decides
            said = verdict.partition("; gap")[0]
            assert ("no difference" in said) == (abs(centre) <= half)
            seen.add("no difference" in said)
    assert len(seen) == (1 if images == 2 else 2)


def test_all_right_against_a_third_of_three_images_is_no_difference_seen():
    (verdict,) = compare.verdicts({"none": results(3, 1.0), "L1": results(3, 1 / 3)})
    assert "test accuracy: no difference seen (-0.667, within ±0.943)" in verdict
    assert "gap: no difference seen (+0.667" in verdict


def test_seeds_that_agree_do_not_make_a_small_difference_seen():
    tied = {"none": results(100, 0.50, 0.60), "L1": results(100, 0.51, 0.61)}
    (verdict,) = compare.verdicts(tied)
    # 110 and 112 of 200 images.
    assert interval(200, 110, 112)[1] == pytest.approx(0.099, abs=5e-4)
    assert "test accuracy: no difference seen (+0.010, within ±0.100)" in verdict
    assert "±0.000" not in verdict
    assert "± 0.000" not in verdict
    (verdict,) = compare.verdicts(
        {"none": results(100, 0.50, 0.60), "L1": results(100, 0.71, 0.81)}
    )
    assert "test accuracy: higher (+0.210 ± 0.0" in verdict


def test_seeds_that_disagree_still_count():
    (verdict,) = compare.verdicts(
        {"none": results(1000, 0.50, 0.50, 0.50), "L1": results(1000, 0.55, 0.60, 0.75)}
    )
    # Student's: 4.303 · 0.104 / √3.
    assert "test accuracy: no difference seen (+0.133, within ±0.259)" in verdict


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, as they were drawn."""
    saved = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


AWKWARD = [r"x $\foo$", "cost$5 to $9", "_snow", r"a\$b", "{curly} % #", "one $ only"]


def shown(text):
    """What a text draws: itself, unless there is a formula in it."""
    drawn, is_formula = text._preprocess_math(text.get_text())
    assert is_formula is False
    return drawn


def test_class_names_are_drawn_as_they_are(figures, tmp_path):
    count = len(AWKWARD)
    matrix = np.eye(count, dtype=int).tolist()
    plots.confusion({"": matrix}, AWKWARD, tmp_path / "c.png", "$\\foo$.ckpt")
    points = np.random.default_rng(0).normal(size=(2 * count, 2))
    plots.features(
        {"PCA": points, "t-SNE": points},
        [*range(count)] * 2,
        AWKWARD,
        tmp_path / "f.png",
        "$\\foo$.ckpt",
    )
    matrices, features = figures
    assert [shown(text) for text in matrices.axes[0].get_xticklabels()] == AWKWARD
    assert [shown(text) for text in matrices.axes[0].get_yticklabels()] == AWKWARD
    assert [shown(text) for text in features.legends[0].get_texts()] == AWKWARD
    assert shown(matrices._suptitle).endswith("\n$\\foo$.ckpt")


def test_a_letter_is_drawn_in_a_font_that_has_it(figures, tmp_path):
    ours = get_font(findfont(FontProperties())).get_charmap()
    # Of a font that comes with matplotlib.
    other = get_font(findfont(FontProperties(family="STIXGeneral"))).get_charmap()
    letter = next(chr(code) for code in sorted(set(other) - set(ours)) if chr(code).isalpha())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.confusion({"": [[1, 0], [0, 1]]}, [letter, "b"], tmp_path / "c.png", letter)
    (figure,) = figures
    assert len(figure.axes[0].get_xticklabels()[0].get_fontfamily()) == 2


@pytest.mark.parametrize("count", [2, 15, 40])
def test_each_class_has_a_look_of_its_own_and_a_key(count, figures, tmp_path):
    names = [f"class {label}" for label in range(count)]
    points = np.random.default_rng(0).normal(size=(count, 2))
    plots.features({"PCA": points, "t-SNE": points}, range(count), names, tmp_path / "f.png", "")
    (key,) = figures[0].legends
    assert [text.get_text() for text in key.get_texts()] == names
    looks = [(line.get_color(), line.get_marker()) for line in key.legend_handles]
    assert len(set(looks)) == count
    # No two colours are neighbours of a continuous scale.
    assert len({colour for colour, _ in looks}) == min(10, count)
    box = key.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figures[0].bbox.height


def test_the_title_tells_that_there_are_too_many_classes_for_a_key(figures, tmp_path):
    names = [f"class {label}" for label in range(41)]
    points = np.zeros((41, 2))
    plots.features({"PCA": points, "t-SNE": points}, range(41), names, tmp_path / "f.png", "")
    assert not figures[0].legends
    assert "41 classes, too many for a key" in figures[0].get_suptitle()


def test_a_long_subtitle_is_not_cut(figures, tmp_path):
    matrices = {key: [[7, 1], [2, 6]] for key in ("none", "L2", "L1", "elastic net")}
    runs = {"none": results(500, 0.5, 0.6, 0.7)}
    subtitle = f"{compare.conditions(runs)}, summed over them, and then some words more than fit"
    plots.confusion(matrices, ["a", "b"], tmp_path / "c.png", subtitle)
    (figure,) = figures
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    # Nor does it lie on what is below.
    assert box.y0 >= max(axes.title.get_window_extent().y1 for axes in figure.axes[:2])
    words = figure._suptitle._get_wrapped_text().split()
    assert " ".join(words).endswith(subtitle)


def test_curves_that_coincide_are_all_seen(figures, tmp_path):
    runs = {name: results(500, 0.5) for name in ("none", "L2", "L1", "elastic net")}
    plots.training_curves(runs, tmp_path / "t.png", "")
    zeros = {name: rs[0].zeros_by_layer for name, rs in runs.items()}
    plots.sparsity_by_layer(zeros, tmp_path / "s.png", "")
    curves, sparsity = figures
    tests = [line for line in curves.axes[0].lines if line.get_linestyle() == "-"]
    for lines in (tests, [line for line in sparsity.axes[0].lines if line.get_marker() != "None"]):
        assert len(lines) == 4
        assert len({line.get_marker() for line in lines}) == 4
        # What is drawn later is smaller.
        for earlier, later in itertools.pairwise(lines):
            assert earlier.get_markersize() > later.get_markersize()
            assert earlier.get_linewidth() > later.get_linewidth()
