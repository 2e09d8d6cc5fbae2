"""Runs whose weights are pulled towards the initial ones, and arms that compare them."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from test_recipe_runs import SHORT, Signal

from resnet_reg_ext import apply_patch, cli
from resnet_reg_ext.recipe.arms import arms, strength_options
from resnet_reg_ext.recipe.files import RecipeError, Stopped
from resnet_reg_ext.recipe.model import Classifier
from resnet_reg_ext.recipe.train import train
from resnet_reg_ext.recipe.tune import grids

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights that no seed of a run draws, with the head of other classes."""
    file = tmp_path_factory.mktemp("start") / "w.pt"
    torch.save(Classifier(replace(SHORT, seed=9), ["a", "b"]).model.state_dict(), file)
    return file


def test_a_large_l1_keeps_the_weights_at_their_start_resumed_too(weights, tmp_path):
    run = replace(SHORT, weights=str(weights), toward="start", l1=1e3, lr=1e-3)
    with pytest.raises(Stopped):
        train(run, tmp_path / "out", callbacks=[Signal(15, 2)])
    train(run, tmp_path / "out", resume=True)
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"]
    start = torch.load(weights, weights_only=True)
    for name in ("conv1.weight", "layer1.0.conv2.weight", "layer4.2.conv3.weight"):
        assert torch.equal(state[f"model.{name}"], start[name])
    assert not torch.equal(state["model.bn1.bias"], start["bn1.bias"])
    assert not state["model.fc.weight"].any()  # the new head is pulled towards zero


def test_a_run_writes_its_patch_on_request(weights, tmp_path, capsys):
    out = tmp_path / "out"
    options = [f"--{n}-size={v}" for n, v in (("train", 10), ("val", 10), ("test", 10))]
    options += ["--image-size=8", "--batch-size=10", "--epochs=1", "--accelerator=cpu"]
    options += [f"--weights={weights}", "--toward=start", "--l1=1e3", "--lr=1e-3", "--patch"]
    assert cli.main(["train", *options, f"--out={out}"]) == 0
    assert str(out / "patch.safetensors") in capsys.readouterr().out.split("Written:")[1]
    again = apply_patch(torch.load(weights, weights_only=True), out / "patch.safetensors")
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert {f"model.{name}" for name in again} == set(state)
    assert all(torch.equal(state[f"model.{name}"], value) for name, value in again.items())


def test_arms_and_grids_have_both_where_there_are_weights(weights):
    run = replace(SHORT, l1=0.1, weight_decay=0.2)
    names = ["none", "L2", "L1", "elastic net"]
    assert list(arms(run)) == names
    for other in ({"channels": 0.5}, {"target_sparsity": 0.5}):
        assert list(arms(replace(run, weights=str(weights), **other))) == names
    run = replace(run, weights=str(weights))
    found = arms(run, {"L1-SP": (0.3, 0.0)})
    assert list(found) == [*names, "L2-SP", "L1-SP"]
    for name, (l1, weight_decay) in {"L2-SP": (0.0, 0.2), "L1-SP": (0.3, 0.0)}.items():
        assert found[name] == replace(run, l1=l1, weight_decay=weight_decay, toward="start")
    assert {found[name].toward for name in names} == {"zero"}
    grid = grids(run, 2)
    assert list(grid) == [*names[1:], "L2-SP", "L1-SP"]
    strengths = {"elastic net": (1.0, 2.0), "L2-SP": (0.0, 3.0), "L1-SP": (4.0, 0.0)}
    assert strength_options(strengths) == {"elastic_net": [1.0, 2.0], "l2_sp": 3.0, "l1_sp": 4.0}


def test_a_comparison_with_all_arms_is_repeated_by_its_file(weights, tmp_path):
    pytest.importorskip("torch_pruning")
    options = [f"--{n}-size={v}" for n, v in (("train", 10), ("val", 10), ("test", 10))]
    options += ["--image-size=8", "--batch-size=10", "--epochs=2", "--accelerator=cpu"]
    options += [f"--weights={weights}", "--l1-sp=7e-4", "--group-by=none", "--group-lasso=0.4"]
    assert cli.main(["compare", *options, f"--out={tmp_path / 'out'}"]) == 0
    runs = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    told = {name: (runs[name][0]["run"]["toward"], runs[name][0]["run"]["l1"]) for name in runs}
    assert told["L1-SP"] == ("start", 7e-4)
    assert told["L2-SP"] == ("start", 0.0)
    assert told["L1"][0] == "zero"
    assert told["group lasso"] == ("zero", 0.0)
    channels = {name: runs[name][0]["run"]["channels"] for name in runs}
    assert channels == {**dict.fromkeys(runs), "group lasso": 0.4}
    content = yaml.safe_load((tmp_path / "out" / "compare.yaml").read_text())
    assert (content["l1_sp"], content["toward"], content["group_lasso"]) == (7e-4, "zero", 0.4)
    assert "group lasso: 40% of the channels" in (tmp_path / "out" / "compare.md").read_text()
    assert cli.main(["compare", "--resume", str(tmp_path / "out")]) == 0
    assert "L1-SP" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["train", "--toward=start"], "--toward start can't be combined with --weights none"),
        (["train", "--toward=start", "--weights=w", "--channels=0.5"], "combined with --channels"),
        (["train", "--patch"], "--patch needs --weights FILE"),
        (["train", "--patch", "--weights=w", "--channels=0.5"], "combined with --channels"),
        (["compare", "--toward=start"], "--toward start is for train and path"),
        (["tune", "--toward=start"], "--toward start is for train and path"),
        (["path", "--toward=start", "--warm"], "--toward start isn't for --warm"),
        (["compare", "--l2-sp=1"], "--l2-sp needs --weights"),
        (["compare", "--tune", "--l1-sp=1"], "--l1-sp can't be given with --tune"),
    ],
)
def test_what_does_not_go_together_is_refused(command, reason, tmp_path, capsys):
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steering_to_zeros_is_refused(tmp_path):
    run = replace(SHORT, weights="w", toward="start", l1=0.1, target_sparsity=0.5)
    with pytest.raises(RecipeError, match="can't be combined with --target-sparsity"):
        train(run, tmp_path / "out")
