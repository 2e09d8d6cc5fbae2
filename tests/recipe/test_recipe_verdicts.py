"""What may be concluded from several runs, and how it is put into words and tables."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from resnet_reg_ext.recipe import verdicts as compare
from resnet_reg_ext.recipe.compare import reported
from resnet_reg_ext.recipe.results import Best, OnTest, Result
from resnet_reg_ext.recipe.settings import Run


def results(images, *accuracies, train_accuracy=1.0):
    """A run a seed, of so many test images each."""
    return [
        Result(
            Run(seed=seed),
            {
                "classes": ["a", "b"],
                "train_images": 9,
                "wrong_labels": 0,
                "validation_images": images,
                "test_images": 0,
            },
            [
                {
                    "epoch": 1.0,
                    "train_accuracy": train_accuracy,
                    "validation_accuracy": accuracy,
                    "train_loss": 0.1,
                    "validation_loss": 0.5,
                    "validation_f1": 0.5,
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
    assert "validation accuracy: no difference seen (-0.667, within ±0.943)" in verdict
    assert "gap: no difference seen (+0.667" in verdict


@pytest.mark.parametrize("losses", [(0.3, 0.4, 0.35), (0.9, 0.2, 0.55), (0.5, 0.5, 0.5)])
def test_a_difference_in_loss_is_seen_over_seeds_where_a_paired_t_test_sees_it(losses):
    runs = {"none": results(100, 0.5, 0.6, 0.7), "L1": results(100, 0.5, 0.6, 0.7)}
    for run, loss in zip(runs["L1"], losses, strict=True):
        run.history[-1]["validation_loss"] = loss
    (verdict,) = compare.verdicts(runs)
    said = verdict.partition("validation loss: ")[2]
    found = np.array(losses) - 0.5
    if not found.any():
        assert said.startswith("no difference seen (+0.000, within ±0.000)")
        return
    interval = ttest_1samp(found, 0).confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    seen = interval.high < 0
    figures = f"({found.mean():+.3f} ± {half:.3f})" if seen else f"({found.mean():+.3f}, within ±"
    assert said.startswith("lower " + figures if seen else "no difference seen " + figures)
    assert seen == (losses[0] == 0.3)
    one = {name: of_name[:1] for name, of_name in runs.items()}
    assert "loss" not in compare.verdicts(one)[0]


def test_seeds_that_agree_do_not_make_a_small_difference_seen():
    tied = {"none": results(100, 0.50, 0.60), "L1": results(100, 0.51, 0.61)}
    (verdict,) = compare.verdicts(tied)
    # 110 and 112 of 200 images.
    assert interval(200, 110, 112)[1] == pytest.approx(0.099, abs=5e-4)
    assert "validation accuracy: no difference seen (+0.010, within ±0.100)" in verdict
    assert "±0.000" not in verdict.partition("; validation loss")[0]
    assert "± 0.000" not in verdict
    (verdict,) = compare.verdicts(
        {"none": results(100, 0.50, 0.60), "L1": results(100, 0.71, 0.81)}
    )
    assert "validation accuracy: higher (+0.210 ± 0.0" in verdict


def test_seeds_that_disagree_still_count():
    (verdict,) = compare.verdicts(
        {"none": results(1000, 0.50, 0.50, 0.50), "L1": results(1000, 0.55, 0.60, 0.75)}
    )
    # Student's: 4.303 · 0.104 / √3.
    assert "validation accuracy: no difference seen (+0.133, within ±0.259)" in verdict


def on_test(right, groups=None, seed=0):
    """A run that has these test images right, or wrong."""
    (base,) = results(9, 0.9)
    accuracy = float(np.mean(right))
    test = OnTest(accuracy, 0.5, accuracy, [int(r) for r in right], groups)
    data = {**base.data, "test_images": len(right)}
    return replace(base, run=Run(seed=seed), data=data, test=test)


def test_images_that_both_runs_have_right_say_nothing():
    """The margin is Agresti and Min's, of the images on which the runs differ."""
    random = np.random.default_rng(0)
    for images, b, c in ((400, 10, 30), (50, 0, 4), (30, 0, 0)):
        first = random.random(images) < 0.7
        second = first.copy()
        second[np.flatnonzero(~first)[:c]] = True
        second[np.flatnonzero(first)[:b]] = False
        n, lost, won = images + 2, b + 0.5, c + 0.5
        half = 2 * math.sqrt(lost + won - (won - lost) ** 2 / n) / n * (images + 2) / images
        margin = compare.images_margin([on_test(first)], [on_test(second)])
        assert margin == pytest.approx(half)
        (verdict,) = compare.verdicts({"none": [on_test(first)], "L1": [on_test(second)]})
        seen = abs(c - b) / images > half
        assert ("test accuracy: no difference seen" in verdict) == (not seen)
        assert margin > 0
        # Copies of the images in one group each are no more images than there were.
        one = [on_test([*first, *first], [*range(images)] * 2)]
        two = [on_test([*second, *second], [*range(images)] * 2)]
        doubled = compare.images_margin(one, two)
        assert doubled == pytest.approx(margin, rel=0.1 if b else 0.6)
        assert compare.images_margin(one, [on_test([*first, *first])]) > 0


def test_a_control_that_stopped_early_needs_no_run():
    history = [
        {**results(9, a)[0].history[0], "epoch": float(e)}
        for e, a in ((1, 0.5), (2, 0.8), (3, 0.6))
    ]
    (end,) = results(9, 0.6)
    best = Best(2.0, {"conv1.weight": 0.25}, [[2, 0], [0, 2]], None)
    whole = replace(end, history=history, best=best)
    early = whole.stopped_early
    assert (early.last["epoch"], early.last["validation_accuracy"]) == (2, 0.8)
    assert early.confusion == [[2, 0], [0, 2]]
    assert whole.reported == whole
    stopping = replace(whole, run=replace(whole.run, early_stopping=1))
    assert stopping.reported.last == early.last
    assert end.stopped_early == end
    rows = reported({"none": [whole], "L1": [whole]})
    assert list(rows) == ["none", "L1", "none, stopped early"]
    assert list(reported({"none": [stopping], "L1": [stopping]})) == ["none", "L1"]


def test_without_test_images_no_figure_is_called_unbiased():
    text = compare.report({"none": results(9, 0.5)}, [])
    assert "There are no test images" in text
    assert "test acc" not in text
    with_test = compare.report({"none": [on_test([1, 0])]}, [])
    assert "There are no test images" not in with_test
    assert "test acc" in with_test


def result(train_accuracy, test_accuracy, zeros=0.0, seed=0):
    row = {"train_accuracy": train_accuracy, "validation_accuracy": test_accuracy, "zeros": zeros}
    row |= {"epoch": 1.0, "train_loss": 0.1, "validation_loss": 0.5, "validation_f1": 0.5}
    data = {"classes": ["a", "b"], "train_images": 40, "wrong_labels": 0}
    data |= {"validation_images": 400, "test_images": 0}
    layers = {"conv1.weight": zeros}
    return Result(Run(seed=seed), data, [row], 9.0, layers, [[1, 0], [0, 1]], {})


def test_a_verdict_of_one_seed_weighs_the_test_images():
    base = {"none": [result(1.0, 0.80)]}
    (close,) = compare.verdicts({**base, "L1": [result(1.0, 0.81, 0.6)]})
    assert close.count("no difference seen") == 2
    assert "60.0% of the regularised weights are exactly zero" in close
    (better,) = compare.verdicts({**base, "L1": [result(0.95, 0.90)]})
    assert "validation accuracy: higher (+0.100" in better
    assert "gap: smaller (-0.150" in better
    (worse,) = compare.verdicts({**base, "L1": [result(1.0, 0.60)]})
    assert "validation accuracy: lower (-0.200" in worse
    assert "gap: larger (+0.200" in worse


def test_a_verdict_of_three_seeds_weighs_the_spread():
    base = {"none": [result(1.0, a) for a in (0.70, 0.75, 0.80)]}
    # Differences of 0.05, 0.04, 0.09: mean 0.06, standard deviation 0.0265, t(2) = 4.303.
    (seen,) = compare.verdicts({**base, "L1": [result(1.0, a) for a in (0.75, 0.79, 0.89)]})
    assert "no difference seen (+0.060, within ±0.066)" in seen
    # Paired, differences that are alike are seen though the seeds differ more; what 1,200 images
    # leave open stays: 2 sqrt((0.75 * 0.25 + 0.80 * 0.20) / 1200) = 0.034.
    (seen,) = compare.verdicts({**base, "L1": [result(1.0, a) for a in (0.75, 0.80, 0.851)]})
    assert "validation accuracy: higher (+0.050 ± 0.034)" in seen
    assert "gap: smaller" in seen


def test_the_table_tells_mean_and_spread():
    runs = [result(1.0, 0.7), result(1.0, 0.8)]
    lines = compare.table({"none": runs}).splitlines()
    assert "0.750 ± 0.071" in lines[2]
    assert "+0.250 ± 0.071" in lines[2]
    assert len({len(line) for line in lines}) == 1
    text = compare.report({"none": runs}, [])
    assert "made wrong" not in text
    assert "2 seeds" in text


def test_wrong_labels_are_said():
    noisy = result(1.0, 0.7)
    noisy = replace(noisy, data={**noisy.data, "wrong_labels": 12})
    assert "Labels were made wrong on purpose" in compare.report({"none": [noisy]}, [])
    assert "12 labels made wrong" in compare.conditions({"none": [noisy]})
