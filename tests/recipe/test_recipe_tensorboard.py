"""What TensorBoard is given, read back with TensorBoard's own reader.

The run is one in bfloat16, with images of 64 pixels that two processes load.
"""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from test_recipe_data import make_images

from resnet_reg_ext import cli
from resnet_reg_ext.recipe.results import Result

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The result of a run that steers l1, its folder, and what TensorBoard reads there."""
    root = tmp_path_factory.mktemp("board")
    make_images(root / "data", ["cat", "dog"], count=10, size=70)
    options = ["--data", root / "data", "--val-fraction", "0.4", "--image-size", "64"]
    options += ["--precision", "bf16-mixed", "--workers", "2", "--accelerator", "cpu"]
    options += ["--l1", "0.01", "--target-sparsity", "0.5", "--epochs", "3", "--batch-size", "6"]
    options += ["--evaluate-every", "1", "--out", root / "out"]
    assert cli.main(["train", *map(str, options)]) == 0
    board = EventAccumulator(str(root / "out" / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return Result.load(root / "out"), root / "out", board


def values(board, tag):
    return [event.value for event in board.Scalars(tag)]


def test_lr_and_the_l1_that_is_steered_have_a_curve(run):
    result, out, board = run
    lr = values(board, "lr")
    assert lr == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 6)) for k in range(6)])
    l1 = values(board, "l1")
    assert l1[0] == pytest.approx(result.run.l1)
    assert len(set(l1)) > 2
    group = torch.load(out / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert l1[-1] == pytest.approx(group[0]["l1"]) or group[0]["l1"] == 0  # frozen after it


def test_each_layer_has_a_curve_of_its_zeros(run):
    result, _, board = run
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith("zeros by layer/")]
    assert {tag.partition("/")[2] for tag in tags} == set(result.zeros_by_layer)
    assert len(tags) == 54
    for tag in tags:
        shares = values(board, tag)
        assert len(shares) == len(result.history) == 3
        assert shares[-1] == pytest.approx(100 * result.zeros_by_layer[tag.partition("/")[2]])
    assert [e.step for e in board.Scalars(tags[0])] == [2, 4, 6]


def test_the_hparams_tab_has_settings_and_results(run):
    result, _, board = run
    content = board.PluginTagToContent("hparams")
    read = plugin_data_pb2.HParamsPluginData.FromString
    (start,) = (read(data) for tag, data in content.items() if tag.endswith("session_start_info"))
    settings = dict(start.session_start_info.hparams)
    assert settings["l1"].number_value == result.run.l1
    assert settings["precision"].string_value == "bf16-mixed"
    (experiment,) = (read(data) for tag, data in content.items() if tag.endswith("experiment"))
    metrics = {info.name.tag for info in experiment.experiment.metric_infos}
    assert {"result/train_accuracy", "result/gap", "result/zeros"} <= metrics
    for tag in metrics:
        (value,) = values(board, tag)
        assert value == pytest.approx(result.last[tag.removeprefix("result/")])
    assert "hp_metric" not in board.Tags()["scalars"]


def test_plots_are_shown(run):
    _, _, board = run
    assert set(board.Tags()["images"]) == {"training_curves", "confusion", "sparsity_by_layer"}
    (picture,) = board.Images("confusion")
    assert min(picture.width, picture.height) > 200


def test_a_run_in_bfloat16_learns_and_is_measured(run):
    result, out, _ = run
    assert all(math.isfinite(row["train_loss"]) for row in result.history)
    weights = torch.load(out / "best.ckpt", weights_only=True)["state_dict"]
    assert weights["model.conv1.weight"].dtype is torch.float32
    assert sum(map(sum, result.confusion)) == 8
