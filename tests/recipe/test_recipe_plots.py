"""Plots: names drawn as they are, curves that are all seen, titles that fit."""

import itertools
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from test_recipe_verdicts import results

from resnet_reg_ext.recipe import plots
from resnet_reg_ext.recipe import verdicts as compare


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
