"""What may be concluded from several runs, and how it is put into words and tables."""

import math
from dataclasses import replace

import pytest

from resnet_reg_ext.recipe import compare
from resnet_reg_ext.recipe.results import Result
from resnet_reg_ext.recipe.settings import Run


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


def result(train_accuracy, test_accuracy, zeros=0.0, seed=0):
    row = {"train_accuracy": train_accuracy, "test_accuracy": test_accuracy, "zeros": zeros}
    row |= {"epoch": 1.0, "train_loss": 0.1, "test_loss": 0.5, "test_f1": 0.5, "train_f1": 0.5}
    data = {"classes": ["a", "b"], "train_images": 40, "wrong_labels": 0, "test_images": 400}
    layers = {"conv1.weight": zeros}
    return Result(Run(seed=seed), data, [row], 9.0, layers, [[1, 0], [0, 1]], {})


def test_a_verdict_of_one_seed_weighs_the_test_images():
    base = {"none": [result(1.0, 0.80)]}
    (close,) = compare.verdicts({**base, "L1": [result(1.0, 0.81, 0.6)]})
    assert close.count("no difference seen") == 2
    assert "60.0% of the regularised weights are exactly zero" in close
    (better,) = compare.verdicts({**base, "L1": [result(0.95, 0.90)]})
    assert "test accuracy: higher (+0.100" in better
    assert "gap: smaller (-0.150" in better
    (worse,) = compare.verdicts({**base, "L1": [result(1.0, 0.60)]})
    assert "test accuracy: lower (-0.200" in worse
    assert "gap: larger (+0.200" in worse


def test_a_verdict_of_three_seeds_weighs_the_spread():
    base = {"none": [result(1.0, a) for a in (0.70, 0.75, 0.80)]}
    # Differences of 0.05, 0.04, 0.09: mean 0.06, standard deviation 0.0265, t(2) = 4.303.
    (seen,) = compare.verdicts({**base, "L1": [result(1.0, a) for a in (0.75, 0.79, 0.89)]})
    assert "no difference seen (+0.060, within ±0.066)" in seen
    # Paired, differences that are alike are seen though the seeds differ more; what 1,200 images
    # leave open stays: 2 sqrt((0.75 * 0.25 + 0.80 * 0.20) / 1200) = 0.034.
    (seen,) = compare.verdicts({**base, "L1": [result(1.0, a) for a in (0.75, 0.80, 0.851)]})
    assert "test accuracy: higher (+0.050 ± 0.034)" in seen
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
