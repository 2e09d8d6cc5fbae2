"""Files of an earlier version, which had two sets and called test what chose the checkpoint.

``former/`` holds the run.yaml and result.json of a real run of it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_recipe_data import make_images

from resnet_reg_ext import cli
from resnet_reg_ext.recipe.data import load_images
from resnet_reg_ext.recipe.files import RecipeError
from resnet_reg_ext.recipe.former import upgraded_settings
from resnet_reg_ext.recipe.model import Classifier, load_classifier
from resnet_reg_ext.recipe.results import Result
from resnet_reg_ext.recipe.settings import Run, run_from_file
from resnet_reg_ext.recipe.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

FORMER = Path(__file__).parent / "former"
ROOT = Path(__file__).resolve().parents[2]


def test_a_former_run_is_made_again_on_the_same_images(tmp_path, capsys):
    """The figures of its first epoch, which depend on images, weights and order."""
    out = tmp_path / "out"
    options = ["--config", str(FORMER / "run.yaml"), "--epochs", "1", "--out", str(out)]
    assert cli.main(["train", *options]) == 0
    assert "tested on: nothing" in capsys.readouterr().out
    run = yaml.safe_load((out / "run.yaml").read_text())
    assert (run["val_size"], run["test_size"]) == (12, 0)
    (row,) = Result.load(out).history
    before = json.loads((FORMER / "result.json").read_text())["history"][0]
    # One epoch of two has the same step, at the same learning rate; losses are rounded otherwise
    # on other processors.
    assert row["train_loss"] == pytest.approx(before["train_loss"], rel=1e-3)
    assert row["validation_loss"] == pytest.approx(before["test_loss"], rel=1e-3)


def test_a_former_result_is_read(tmp_path):
    shutil.copy(FORMER / "result.json", tmp_path)
    result = Result.load(tmp_path)
    before = json.loads((FORMER / "result.json").read_text())
    for row, former in zip(result.history, before["history"], strict=True):
        for metric in ("accuracy", "loss", "f1"):
            assert row[f"validation_{metric}"] == former[f"test_{metric}"]
    assert (result.held_out, result.data["validation_images"]) == ("validation", 12)
    assert (result.test, result.stopped_early) == (None, result)


def test_a_former_comparison_is_loaded_as_it_was():
    content = yaml.safe_load((ROOT / "docs/results/digits-wrong-labels/compare.yaml").read_text())
    assert "val_size" not in content
    settings = upgraded_settings(content)
    assert (settings["val_size"], settings["test_size"], settings["group_by"]) == (500, 0, "none")
    assert upgraded_settings(settings) == settings
    del settings["seeds"]
    assert len(load_images(run_from_file(settings, "compare.yaml")).validation) == 500
    for cold in (False, True):
        assert upgraded_settings({**content, "cold": cold})["warm"] is not cold


def test_a_former_checkpoint_is_evaluated_but_not_trained_on(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "test"):
        make_images(data / split, ["a", "b"], count=4)
    settings = yaml.safe_load((FORMER / "run.yaml").read_text())
    settings |= {"data": str(data), "test_size": None, "train_size": None}
    classifier = Classifier(Run(), ["a", "b"])
    state = {"run": settings, "classes": ["a", "b"], "state_dict": classifier.state_dict()}
    out.mkdir()
    torch.save({**state, "optimizer_states": []}, out / "last.ckpt")
    assert load_classifier(out / "last.ckpt").run.test_size is None
    assert cli.main(["evaluate", str(out / "last.ckpt"), "--out", str(tmp_path / "e")]) == 0
    run = Run(data=str(data), val_fraction=0.5, batch_size=2)
    with pytest.raises(RecipeError, match="is of an earlier version"):
        train(run, out, resume=True)
