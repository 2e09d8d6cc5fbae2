"""Networks of each architecture, some of them narrow or shallow, with the sets of each."""

import functools
from functools import partial

import torch
from torch import nn

from resnet_reg_ext import channels

SIDE = 32


def _vgg():
    from torchvision.models import VGG
    from torchvision.models.vgg import make_layers

    model = VGG(make_layers([16, "M", 24, 24, "M", 32, "M"], batch_norm=True), init_weights=False)
    # 7 x 7 columns of the first linear layer belong to each channel.
    model.classifier[0] = nn.Linear(32 * 49, 40)
    model.classifier[3] = nn.Linear(40, 24)
    model.classifier[6] = nn.Linear(24, 10)
    return model


def _convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt(
        [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)], layer_scale=0.5, num_classes=10
    )


def _builders():
    import timm
    from torchvision import models
    from torchvision.models.resnet import Bottleneck, ResNet

    return {
        "resnet18": partial(models.resnet18, num_classes=10),
        "resnet50": partial(models.resnet50, num_classes=10),
        "wide_resnet": partial(
            ResNet, Bottleneck, [1, 2, 1, 1], width_per_group=128, num_classes=10
        ),
        "resnext": partial(
            ResNet, Bottleneck, [1, 2, 1, 1], groups=32, width_per_group=4, num_classes=10
        ),
        "vgg_bn": _vgg,
        "densenet": partial(models.DenseNet, 8, (2, 3, 2), 16, num_classes=10),
        "mobilenet_v2": partial(models.mobilenet_v2, num_classes=10, width_mult=0.5),
        "convnext": _convnext,
        "efficientnet": partial(models.efficientnet_b0, num_classes=10),
        "timm_resnet50": partial(timm.create_model, "resnet50", num_classes=10),
    }


NAMES = [
    "resnet18",
    "resnet50",
    "wide_resnet",
    "resnext",
    "vgg_bn",
    "densenet",
    "mobilenet_v2",
    "convnext",
    "efficientnet",
    "timm_resnet50",
]


class Tiny(nn.Module):
    """A residual network of 12 channels, with a convolution of three groups and a bias."""

    def __init__(self, norm=nn.BatchNorm2d, activation=nn.ReLU):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 12, 3, padding=1, bias=False), norm(12)
        self.conv1, self.norm1 = nn.Conv2d(12, 9, 3, padding=1), norm(9)
        self.conv2, self.norm2 = nn.Conv2d(9, 12, 3, padding=1, groups=3, bias=False), norm(12)
        self.down, self.norm3 = nn.Conv2d(12, 16, 1, stride=2, bias=False), norm(16)
        self.fc = nn.Linear(16, 4)
        self.act = activation()

    def forward(self, x):
        x = self.act(self.norm0(self.stem(x)))
        x = x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        x = self.act(self.norm3(self.down(self.act(x))))
        return self.fc(x.mean((2, 3)))


@torch.no_grad()
def with_statistics(model):
    """Norms as after training: no weight is 1, no running mean 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.normal_(0, 0.3)
    return model


@functools.cache
def network(name):
    """A float64 model in evaluation mode and its sets. Not to be changed: copy it."""
    torch.manual_seed(0)
    model = with_statistics(_builders()[name]()).double().eval()
    return model, channels(model, torch.rand(1, 3, SIDE, SIDE))


@torch.no_grad()
def kill(model, sets, dead, by_norms=False):
    """Sets the producers of channels to zero.

    Args:
        model: is changed.
        sets: its sets.
        dead: by the set's name the numbers of channels.
        by_norms: only the norms of those sets that have closing ones.
    """
    tensors = dict(model.named_parameters())
    for one in sets:
        for index in (by_norms and one.closing_norms) or one.producers:
            rows = [row for i in dead.get(one.name, ()) for row in index.indices[i]]
            tensors[index.tensor].index_fill_(index.dim, torch.tensor(rows, dtype=torch.long), 0)
    return model
