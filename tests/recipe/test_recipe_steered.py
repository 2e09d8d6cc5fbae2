"""Channels that a group lasso takes to zero: `train --method prox` and an arm of `compare`."""

import signal
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_recipe_channels import TOTAL, sizes
from test_recipe_runs import SHORT, Signal

from resnet_reg_ext import cli
from resnet_reg_ext.recipe.arms import arms
from resnet_reg_ext.recipe.files import RecipeError, Stopped
from resnet_reg_ext.recipe.model import load_classifier
from resnet_reg_ext.recipe.shapes import FORMAT
from resnet_reg_ext.recipe.train import train

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.usefixtures("one_thread")

# Four steps an epoch; channels go in the second and third epoch, after each of which they are out.
RUN = replace(
    SHORT, train_size=40, epochs=7, evaluate_every=7, channels=0.6, method="prox", l1=1e-5
)


class Groups(Callback):
    """Notes the group lasso after each step, and what compaction has left."""

    def __init__(self):
        self.strengths, self.counts = [], []

    def on_train_batch_start(self, trainer, *_):
        groups = trainer.optimizers[0].param_groups
        assert len({group["group_lasso"] for group in groups}) == 1
        self.strengths.append(groups[0]["group_lasso"])

    def on_train_epoch_end(self, trainer, pl_module):
        self.counts.append(sum(sizes(pl_module.model)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run that went through and of one that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("steered")
    groups = Groups()
    whole = train(RUN, folder / "whole", callbacks=[groups])
    # In the third epoch, after a removal and before the share is reached.
    with pytest.raises(Stopped):
        train(RUN, folder / "stopped", callbacks=[Signal(signal.SIGTERM, 10)])
    left = torch.load(folder / "stopped" / "last.ckpt", weights_only=True)
    resumed = train(RUN, folder / "stopped", resume=True)
    return folder, whole, resumed, left, groups


def test_the_share_is_reached_and_a_tenth_of_every_set_stays(runs):
    folder, *_, groups = runs
    for name in ("last.ckpt", "best.ckpt"):
        small = sizes(load_classifier(folder / "whole" / name).model)
        assert sum(small) == pytest.approx(0.4 * TOTAL, abs=0.01 * TOTAL)
    dense = [64, 256, *[64] * 6, 512, *[128] * 8, 1024, *[256] * 12, 2048, *[512] * 6]
    assert sum(dense) == TOTAL
    assert all(after >= 0.1 * before for before, after in zip(dense, small, strict=True))
    assert groups.counts[0] == TOTAL
    assert groups.counts[-1] < groups.counts[1] < TOTAL
    # Without a penalty before and after.
    assert not any(groups.strengths[:4])
    assert all(groups.strengths[4:11])
    assert not any(groups.strengths[12:])


def test_an_interrupted_run_ends_with_the_same_bits(runs):
    folder, whole, resumed, left, _ = runs
    assert left["global_step"] == 10
    shapes = {name: shape for name, (shape, _) in left[FORMAT]["layers"].items()}
    assert shapes["layer4.2.conv3"][0] < 2048
    assert resumed.history == whole.history
    first, second = (
        torch.load(folder / name / "last.ckpt", weights_only=True) for name in ("whole", "stopped")
    )
    assert first[FORMAT] == second[FORMAT]
    assert all(torch.equal(v, second["state_dict"][n]) for n, v in first["state_dict"].items())
    for group in first["optimizer_states"][0]["param_groups"]:
        assert group["rows"] is None
        assert not group["frozen_zeros"]  # L1 goes on


class Loss(Callback):
    """Sets a whole block to zero after each step."""

    def on_train_start(self, trainer, pl_module):
        def kill(*_):
            for parameter in pl_module.model.layer1[1].parameters():
                parameter.data.zero_()

        trainer.optimizers[0].register_step_post_hook(kill)


def test_a_run_that_loses_a_layer_says_so_and_goes_on(tmp_path, capsys):
    run = replace(SHORT, train_size=20, epochs=3, evaluate_every=1, channels=0.5, method="prox")
    with pytest.warns(UserWarning, match=r"all 64 channels of .*layer1.1.conv1.weight\) are zero"):
        train(run, tmp_path / "out", callbacks=[Loss()])
    said = capsys.readouterr().out
    assert "layer1.1.conv1.weight, layer1.1.conv2.weight, layer1.1.conv3.weight wholly zero" in said
    assert "give a lower --channels" in said
    model = load_classifier(tmp_path / "out" / "last.ckpt").model
    assert not hasattr(model.layer1[1], "conv1")  # its shortcut alone is left


def test_a_comparison_has_the_arm_where_it_is_asked_for():
    """How it is trained: test_recipe_start.py."""
    run = replace(SHORT, l1=0.1, weight_decay=0.2)
    assert "group lasso" not in arms(run)
    expected = replace(run, l1=0.0, weight_decay=0.0, channels=0.5, method="prox")
    assert arms(run, group_lasso=0.5)["group lasso"] == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--channels=0.5"], "--group-lasso can't be combined with --channels"),
        (["--freeze=layer1"], "--channels can't be combined with --freeze layer1"),
        (["--epochs=1"], "--channels can't be combined with --epochs 1"),
    ],
)
def test_what_does_not_go_together_is_refused(options, reason, tmp_path, capsys):
    command = ["compare", "--group-lasso=0.5", *options, "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(runs, tmp_path):
    left = runs[3]
    (tmp_path / "out").mkdir()
    key = next(key for key in left["callbacks"] if key.startswith("SteeredRemoval"))
    for name, value in (("is_weighted", 3), ("done_in", 99)):
        content = {**left, "callbacks": {**left["callbacks"]}}
        content["callbacks"][key] = {**left["callbacks"][key], name: value}
        torch.save(content, tmp_path / "out" / "last.ckpt")
        with pytest.raises(RecipeError, match="the checkpoint is damaged: its channels"):
            train(RUN, tmp_path / "out", resume=True)
