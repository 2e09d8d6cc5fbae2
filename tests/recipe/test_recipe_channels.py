"""Channels taken out by the recipe: while training, of a checkpoint, and what is written then."""

import copy
import json
import signal
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_recipe_runs import SHORT, Signal
from torch import nn

from resnet_reg_ext import cli, load_compact
from resnet_reg_ext.recipe.callbacks import Stopped
from resnet_reg_ext.recipe.channel_choice import batches_of, refresh_statistics
from resnet_reg_ext.recipe.checkpoints import save_checkpoint
from resnet_reg_ext.recipe.cost import count_multiply_adds
from resnet_reg_ext.recipe.data import load_images
from resnet_reg_ext.recipe.files import RecipeError
from resnet_reg_ext.recipe.model import Classifier, load_classifier
from resnet_reg_ext.recipe.removal import stages
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.shapes import FORMAT
from resnet_reg_ext.recipe.train import train
from resnet_reg_ext.recipe.weights import load_weights

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.usefixtures("one_thread")

# Two steps an epoch; channels go as the second and the third epoch begin.
RUN = replace(SHORT, train_size=20, epochs=5, evaluate_every=1, channels=0.8)
TOTAL = 11456


class Statistics(Callback):
    """Notes at each evaluation whether the first norm's statistics are those of all images."""

    def __init__(self):
        self.fresh = []

    def on_validation_end(self, trainer, pl_module):
        again = copy.deepcopy(pl_module.model)
        classifier = Classifier(pl_module.run, pl_module.classes)
        classifier.model = again
        with torch.inference_mode(False):
            refresh_statistics(classifier, trainer.datamodule.images.train, pl_module.run)
        self.fresh.append(torch.equal(again.bn1.running_mean, pl_module.model.bn1.running_mean))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run that went through and of one that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("channels")
    statistics = Statistics()
    whole = train(RUN, folder / "whole", callbacks=[statistics])
    # In the second epoch, after the first removal and before the second.
    with pytest.raises(Stopped):
        train(RUN, folder / "stopped", callbacks=[Signal(signal.SIGTERM, 3)])
    left = torch.load(folder / "stopped" / "last.ckpt", weights_only=True)
    resumed = train(RUN, folder / "stopped", resume=True)
    return folder, whole, resumed, left, statistics.fresh


def sizes(model):
    """How many channels each set has: what blocks add to is one set a stage."""
    found = [model.conv1.out_channels]
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        found.append(stage[0].downsample[0].out_channels)
        found += [layer.out_channels for block in stage for layer in (block.conv1, block.conv2)]
    return found


def test_the_share_is_reached_and_a_tenth_of_every_set_stays(runs):
    folder, *_ = runs
    dense = sizes(Classifier(RUN, "0123456789").model)
    assert sum(dense) == TOTAL
    assert len(dense) == 37
    for name in ("last.ckpt", "best.ckpt"):
        small = sizes(load_classifier(folder / "whole" / name).model)
        assert 0.19 * TOTAL < sum(small) <= 0.2 * TOTAL
        for before, after in zip(dense, small, strict=True):
            assert after >= 0.1 * before
            assert after % 8 == 0


def test_an_interrupted_run_ends_with_the_same_bits(runs):
    folder, whole, resumed, left, _ = runs
    assert left["global_step"] == 3
    shapes = {name: shape for name, (shape, _) in left[FORMAT]["layers"].items()}
    assert 0.2 * 2048 < shapes["layer4.2.conv3"][0] <= 2048  # between both removals
    assert resumed.history == whole.history
    assert resumed.confusion == whole.confusion
    first, second = (
        torch.load(folder / name / "last.ckpt", weights_only=True) for name in ("whole", "stopped")
    )
    assert first[FORMAT] == second[FORMAT]
    assert all(torch.equal(v, second["state_dict"][n]) for n, v in first["state_dict"].items())
    momentum = [c["optimizer_states"][0]["state"] for c in (first, second)]
    assert len(momentum[0]) == 161
    for index, state in momentum[0].items():
        assert torch.equal(state["momentum_buffer"], momentum[1][index]["momentum_buffer"])


def test_statistics_are_measured_anew_while_channels_go(runs):
    *_, fresh = runs
    assert fresh == [False, True, True, False, False]


def test_refreshed_statistics_are_those_of_the_images():
    images = load_images(RUN).train
    classifier = Classifier(RUN, "0123456789")
    refresh_statistics(classifier, images, RUN)
    norm, seen = classifier.model.bn1, []
    with torch.no_grad():
        for batch, _ in batches_of(images, RUN):
            seen.append(classifier.model.conv1(batch.double().float()).double())
    mean = torch.stack([values.mean((0, 2, 3)) for values in seen]).mean(0)
    variance = torch.stack([values.var((0, 2, 3)) for values in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1
    assert classifier.training


def test_channels_go_within_four_tenths_of_the_epochs():
    assert stages(2) == [1]
    assert stages(5) == [1, 2]
    assert stages(20) == [2, 4, 5, 6, 8]
    assert stages(100) == [10, 18, 25, 32, 40]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"freeze": "layer1"}, "--channels can't be combined with --freeze layer1"),
        ({"l1": 0.1, "target_sparsity": 0.5}, "can't be combined with --target-sparsity"),
        ({"early_stopping": 2}, "can't be combined with --early-stopping"),
        ({"devices": 2}, "can't be combined with --devices 2"),
        ({"epochs": 1}, "can't be combined with --epochs 1"),
        ({"channels": 0.9}, "--channels: must be above 0 and at most 0.85, got 0.9"),
        ({"method": "luck"}, "--method: must be one of taylor, prox, got 'luck'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path, change, reason):
    with pytest.raises(RecipeError, match=reason.replace("(", r"\(")):
        train(replace(RUN, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_path_and_missing_packages_are_refused(runs, tmp_path, monkeypatch, capsys):
    folder, *_ = runs
    assert cli.main(["path", "--warm", "--channels=0.5", "--out", str(tmp_path / "p")]) == 2
    assert "--channels isn't for --warm" in capsys.readouterr().err
    given = str(folder / "whole" / "best.ckpt")
    for package, command in {
        "onnxscript": ["export", given, "--onnx", str(tmp_path / "a.onnx")],
        "onnxruntime": ["latency", given],
        "torch_pruning": ["compact", given],
    }.items():
        with monkeypatch.context() as missing:
            missing.setitem(__import__("sys").modules, package, None)
            assert cli.main(command) == 2
        error = capsys.readouterr().err
        extra = "compact" if package == "torch_pruning" else "export"
        assert f"pip install 'resnet_reg_ext[{extra}]'" in error
        assert error.count("\n") == 1


# Compact checkpoints of a run that had all channels


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A dense checkpoint, half of whose channels in some blocks are zero."""
    classifier = Classifier(Run(image_size=16, train_size=20, accelerator="cpu"), "0123456789")
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        for block in classifier.model.layer3:
            for layer in (block.conv1, block.bn1):
                for parameter in layer.parameters():
                    parameter[::2] = 0
    content = {"state_dict": classifier.state_dict()}
    classifier.on_save_checkpoint(content)
    assert FORMAT not in content
    file = tmp_path_factory.mktemp("dead") / "dense.ckpt"
    save_checkpoint(content, file)
    return file


def test_dead_channels_are_taken_out_and_outputs_stay(dead, capsys):
    assert cli.main(["compact", str(dead)]) == 0
    said = capsys.readouterr().out
    assert "layer3.0.conv1" in said
    assert "outputs differ by" in said
    file = dead.with_name("dense-compact.ckpt")
    assert str(file) in said
    before, after = load_classifier(dead), load_classifier(file)
    assert sum(sizes(after.model)) == TOTAL - 6 * 128
    assert after.run == before.run
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = before(images)
        torch.testing.assert_close(
            after(images), expected, rtol=0, atol=1e-5 * expected.abs().max()
        )
    # Nothing is left to take out.
    assert cli.main(["compact", str(file)]) == 2
    assert "none of the 10688 channels that can be taken out is all zero" in capsys.readouterr().err


def test_a_share_of_channels_or_of_multiply_adds_goes(dead, tmp_path, capsys):
    share, macs = tmp_path / "share.ckpt", tmp_path / "macs.ckpt"
    assert cli.main(["compact", str(dead), "--share", "0.3", "--out", str(share)]) == 0
    assert 0.69 * TOTAL < sum(sizes(load_classifier(share).model)) <= 0.7 * TOTAL
    options = ["--macs", "0.6", "--method", "magnitude", "--out", str(macs)]
    assert cli.main(["compact", str(dead), *options]) == 0
    dense, small = (count_multiply_adds(load_classifier(file).model, 16) for file in (dead, macs))
    assert 0.35 < small / dense <= 0.4
    capsys.readouterr()
    assert cli.main(["compact", str(dead), "--share", "0.95", "--out", str(share)]) == 2
    assert "--share 0.95 is more than can go" in capsys.readouterr().err
    assert cli.main(["compact", str(dead), "--out", str(dead)]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err


def test_a_compact_checkpoint_is_evaluated_and_trained_on(runs, tmp_path, capsys):
    folder, *_ = runs
    file = folder / "whole" / "last.ckpt"
    assert cli.main(["evaluate", str(file), "--out", str(tmp_path / "evaluation")]) == 0
    measured = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    result = json.loads((folder / "whole" / "result.json").read_text())
    assert measured["accuracy"] == pytest.approx(result["test"]["test_accuracy"])
    plain = tmp_path / "plain.safetensors"
    assert cli.main(["export", str(file), "--weights", str(plain)]) == 0
    model = load_classifier(file).model
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(load_compact(plain)(images), model(images))
    # A run goes on from both; with other classes the head is a new one.
    for source in (file, plain):
        tuned = train(replace(SHORT, epochs=1, weights=str(source)), tmp_path / source.suffix)
        assert "with its class head" in capsys.readouterr().out
        assert tuned.run.channels is None
        last = load_classifier(tmp_path / source.suffix / "last.ckpt").model
        assert last.layer4[2].conv3.weight.shape == model.layer4[2].conv3.weight.shape
    other = Classifier(RUN, "abc")
    assert "its head for 10 classes is replaced" in load_weights(other, str(plain))
    assert other.model.fc.weight.shape == (3, model.fc.in_features)
    assert torch.equal(other.model.conv1.weight, model.conv1.weight)
    assert other(images).shape == (2, 3)


def test_damaged_shapes_are_refused(runs, tmp_path):
    folder, *_ = runs
    content = torch.load(folder / "whole" / "best.ckpt", weights_only=True)
    size = content[FORMAT]["layers"]["layer1.0.conv1"][0]
    for change, reason in {
        "version": "has version 9 of the format",
        "huge": "layer1.0.conv1.weight is .*, must be",
        "groups": "has a kernel or groups that don't fit",
        "misfit": "is damaged: ",
        "missing": "layer1.0.conv1.weight is missing",
        "foreign": "is a compact vgg16, not a resnet50",
        "headless": "its shapes have no fc of two dimensions",
        "expanded": "layer1.0.conv1.weight has fewer values than its shape says",
        "text": "its shapes aren't those of a compact model",
    }.items():
        damaged = copy.deepcopy(content)
        description, state = damaged[FORMAT], damaged["state_dict"]
        if change == "version":
            description["version"] = 9
        elif change == "huge":
            description["layers"]["layer1.0.conv1"] = [[10**7, 10**7, 1, 1], 1]
        elif change == "groups":
            description["layers"]["layer1.0.conv1"] = [size, 3]
        elif change == "misfit":
            # Shapes and tensors agree, but the layer reads more channels than there are.
            description["layers"]["layer1.0.conv1"] = [[size[0], size[1] + 8, 1, 1], 1]
            state["model.layer1.0.conv1.weight"] = torch.zeros(size[0], size[1] + 8, 1, 1)
        elif change == "missing":
            del state["model.layer1.0.conv1.weight"]
        elif change == "headless":
            description["layers"]["fc"] = [[], 1]
        elif change == "expanded":
            state["model.layer1.0.conv1.weight"] = torch.zeros(1, 1, 1, 1).expand(size)
        elif change == "foreign":
            description["architecture"] = "vgg16"
        else:
            damaged[FORMAT] = "small"
        file = tmp_path / f"{change}.ckpt"
        torch.save(damaged, file)
        with pytest.raises(RecipeError, match=reason):
            load_classifier(file)


def test_onnx_gives_what_torch_gives(runs, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, *_ = runs
    source, file = folder / "whole" / "last.ckpt", tmp_path / "model.onnx"
    assert cli.main(["export", str(source), "--onnx", str(file), "--check"]) == 0
    assert "onnxruntime's outputs differ by" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list("0123456789")
    assert metadata["image_size"] == "8"
    model = load_classifier(source).model
    for count in (1, 7):
        images = torch.randn(count, 3, 8, 8)
        (got,) = session.run(["logits"], {"images": images.numpy()})
        expected = model(images).detach()
        assert (torch.from_numpy(got) - expected).abs().max() <= 1e-4 * expected.abs().max()
    # What differs isn't written: NaN isn't within any tolerance.
    content = torch.load(source, weights_only=True)
    content["state_dict"]["model.fc.bias"][0] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    bad = tmp_path / "bad.onnx"
    assert cli.main(["export", str(tmp_path / "nan.ckpt"), "--onnx", str(bad), "--check"]) == 2
    assert "is not written" in capsys.readouterr().err
    assert not bad.exists()
    assert cli.main(["export", str(source)]) == 2
    assert "give --onnx FILE or --weights FILE" in capsys.readouterr().err


def test_latency_is_told_beside_the_dense_model(runs, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, *_ = runs
    threads = torch.get_num_threads()
    file = folder / "whole" / "last.ckpt"
    assert cli.main(["latency", str(file), "--rounds", "1", "--image-size", "32"]) == 0
    said = capsys.readouterr().out
    head, _, dense, small, *_ = said.splitlines()
    for way in ("eager", "folded", "onnxruntime"):
        assert f"{way}, 1" in head
        assert f"{way}, 8" in head
    assert dense.split("|")[1].strip() == "dense"
    assert dense.split("|")[2].strip() == "23.5 M"
    assert str(file) in small
    assert small.count(" x)") == 6
    assert "32 px; 1 thread each" in said
    assert torch.get_num_threads() == threads
