"""Which sets' norms alone make their channels zero, by a trial of each."""

import pickle

import pytest
import timm
import torch
from networks import SIDE, network
from torch import nn

from resnet_reg_ext import channels, compact, zero_dead_columns


def names_of(indices):
    return [index.tensor for index in indices]


def test_closing_norms_are_those_of_every_path():
    sets = {name: network(name)[1] for name in ("resnet50", "densenet", "mobilenet_v2", "vgg_bn")}
    stream = next(one for one in sets["resnet50"] if one.name == "layer1.0.conv3")
    assert names_of(stream.closing_norms) == [
        f"layer1.{norm}.{leaf}"
        for norm in ("0.bn3", "0.downsample.1", "1.bn3", "2.bn3")
        for leaf in ("weight", "bias")
    ]
    # A DenseNet's norms are behind the concatenation, one for each layer that reads it.
    assert names_of(sets["densenet"][0].closing_norms) == [
        name for name in names_of(sets["densenet"][0].producers) if "norm" in name
    ]
    for name in ("resnet50", "densenet", "mobilenet_v2"):
        assert all(one.closing_norms for one in sets[name])
    assert [one.name for one in sets["vgg_bn"] if not one.closing_norms] == [
        "classifier.0",
        "classifier.3",
    ]


class Block(nn.Module):
    """conv and norm, in some way not the only path."""

    def __init__(self, way, width=6, affine=True):
        super().__init__()
        self.way = way
        self.stem, self.inner = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 1)
        self.norm, self.norm0 = nn.BatchNorm2d(width, affine=affine), nn.BatchNorm2d(width)
        self.side = nn.Conv2d(3, width, 3)
        self.last, self.norm1 = nn.Conv2d(width, 5, 1), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 2)

    def forward(self, images):
        x = self.stem(images)
        if self.way == "plain":
            x = self.norm(x)
        elif self.way == "residual":
            x = torch.relu(x) + self.norm(self.inner(torch.relu(x)))
        elif self.way == "residual, closed":
            x = self.norm0(x)
            x = x + self.norm(self.inner(torch.relu(x)))
        elif self.way == "gated by a norm":
            x = x * self.norm(self.side(images))
        else:
            # The consumer of a channel reads zeros, but all channels are scaled by this one.
            x = self.norm(x) * x.sum((1, 2, 3), keepdim=True)
        return self.fc(torch.relu(self.norm1(self.last(torch.relu(x)))).mean((2, 3)))


@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize(
    ("way", "closing"),
    [
        ("plain", ["norm.weight", "norm.bias"]),
        ("residual", []),
        ("residual, closed", ["norm.weight", "norm.bias", "norm0.weight", "norm0.bias"]),
        ("gated by a norm", ["norm.weight", "norm.bias"]),
    ],
)
def test_a_path_without_a_norm_is_found(way, closing, width):
    found = {one.name: one for one in channels(Block(way, width), torch.rand(2, 3, 8, 8))}
    assert names_of(found["stem"].closing_norms) == closing
    # One set that fails says nothing of others.
    assert names_of(found["last"].closing_norms) == ["norm1.weight", "norm1.bias"]


def test_what_is_read_before_the_norm_is_found():
    found = channels(Block("read before the norm"), torch.rand(2, 3, 8, 8))
    assert [bool(one.closing_norms) for one in found if one.name in ("stem", "last")] == [
        False,
        True,
    ]


def test_norms_without_weights_close_nothing():
    found = channels(Block("plain", affine=False), torch.rand(2, 3, 8, 8))
    assert found[0].closing_norms == ()


def test_sets_that_were_pickled_without_closing_norms_have_none():
    one = channels(Block("plain"), torch.rand(2, 3, 8, 8))[0]
    del vars(one)["closing_norms"]
    loaded = pickle.loads(pickle.dumps(one))
    assert loaded.closing_norms == ()
    assert loaded.producers == one.producers


def test_a_model_that_begins_with_norms_of_zero_loses_nothing():
    """Each block's last norm begins at zero, but the channels have other paths."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    zeros = [
        ResNet(BasicBlock, [2, 1, 1, 1], num_classes=4, zero_init_residual=True),
        ResNet(Bottleneck, [1, 2, 1, 1], num_classes=4, zero_init_residual=True),
        timm.models.ResNet(timm.models.resnet.Bottleneck, [1, 2, 1, 1], zero_init_last=True),
    ]
    for model in zeros:
        last = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not all(weight.any() for weight in last)
        x = torch.rand(1, 3, SIDE, SIDE)
        sets = channels(model, x)
        assert all(one.closing_norms for one in sets)
        report = compact(model, x, sets=sets).report
        assert not report.removed
        assert not report.kept_zero
        assert not report.shortcuts
        assert zero_dead_columns(model, sets) == 0
