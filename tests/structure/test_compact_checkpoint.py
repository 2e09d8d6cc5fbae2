"""Files of compact models: read without pickle, and refused where they are damaged."""

import copy
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SIDE, Tiny, kill, network
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from resnet_reg_ext import channels, compact, load_compact, remove, save_compact

FORMATS = ["pt", "safetensors"]


def small(name, share=0.6):
    model, sets = network(name)
    return remove(model, None, share=share, sets=sets).model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small MobileNet in both formats."""
    model, sets = network("mobilenet_v2")
    model = remove(model, None, share=0.85, min_keep=0.05, sets=sets).model.float()
    paths = {}
    for suffix in FORMATS:
        paths[suffix] = tmp_path_factory.mktemp("saved") / f"model.{suffix}"
        save_compact(paths[suffix], model, architecture="mobilenet_v2")
    return model, paths


@pytest.mark.parametrize(
    ("name", "architecture", "suffix"),
    [
        ("resnet18", "resnet18", "safetensors"),
        ("resnet50", "resnet50", "pt"),
        ("mobilenet_v2", None, "pt"),
        ("efficientnet", "efficientnet_b0", "safetensors"),
    ],
)
def test_a_loaded_model_is_the_saved_one(tmp_path, name, architecture, suffix):
    model = small(name)
    file = tmp_path / f"model.{suffix}"
    save_compact(file, model, architecture=architecture)
    loaded = load_compact(file)
    assert type(loaded) is type(network(name)[0])
    assert not loaded.training
    x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
    # Where memory is aligned otherwise, sums have another order.
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-11, atol=1e-11)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in {*ours} | {*theirs})
    # It can be trained and made smaller again.
    loaded.train()(x).sum().backward()
    assert channels(loaded, x[:1]).total == channels(model, x[:1]).total
    assert os.listdir(tmp_path) == [file.name]


def test_groups_and_shortcuts_are_restored(tmp_path):
    dense, sets = network("resnext")
    dead = {one.name: range(3, 7) for one in sets if one.name == "layer1.0.conv1"}
    model = compact(kill(copy.deepcopy(dense), sets, dead), None, sets=sets).model
    save_compact(tmp_path / "a.pt", model, architecture="")
    loaded = load_compact(tmp_path / "a.pt", dense)
    x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-11, atol=1e-11)
    assert loaded.layer1[0].conv2.groups == model.layer1[0].conv2.groups == 28

    model = copy.deepcopy(network("resnet18")[0])
    with torch.no_grad():
        for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn2.bias", "bn2.weight"):
            model.layer2[1].get_parameter(name).zero_()
    result = compact(model, x)
    assert result.report.shortcuts == ("layer2.1",)
    for suffix in FORMATS:
        save_compact(tmp_path / f"b.{suffix}", result.model, architecture="resnet18")
        loaded = load_compact(tmp_path / f"b.{suffix}")
        torch.testing.assert_close(loaded(x), result.model(x), rtol=1e-11, atol=1e-11)


def test_another_class_is_loaded_into_one_that_is_given(tmp_path):
    model = remove(Tiny(), torch.rand(1, 3, 8, 8), share=0.5).model.eval()
    with pytest.raises(ValueError, match="none of torchvision's models has the layers"):
        save_compact(tmp_path / "a.pt", model)
    save_compact(tmp_path / "a.pt", model, architecture="")
    with pytest.raises(ValueError, match="must be given one of its class"):
        load_compact(tmp_path / "a.pt")
    dense = Tiny()
    loaded = load_compact(tmp_path / "a.pt", dense)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))
    assert dense.down.out_channels == 16  # a copy was changed


def test_another_architecture_is_refused_by_what_differs(tmp_path):
    model = copy.deepcopy(network("mobilenet_v2")[0])
    with pytest.raises(ValueError, match="model is no resnet18: it is a MobileNetV2"):
        save_compact(tmp_path / "a.pt", model, architecture="resnet18")
    with pytest.raises(ValueError, match=r"architecture is 'os\.system': must be one of"):
        save_compact(tmp_path / "a.pt", model, architecture="os.system")
    model.features[3].conv[0][0].dilation = (2, 2)
    with pytest.raises(ValueError, match=r"features.3.conv.0.0.dilation is \(2, 2\), not \(1, 1\)"):
        save_compact(tmp_path / "a.pt", model)
    assert not os.listdir(tmp_path)


def test_the_files_are_plain_data(saved):
    _, paths = saved
    content = torch.load(paths["pt"], weights_only=True)
    assert content["architecture"] == "mobilenet_v2"
    assert content["layers"]["features.1.conv.0.0"] == [
        list(content["state_dict"]["features.1.conv.0.0.weight"].shape),
        content["state_dict"]["features.1.conv.0.0.weight"].shape[0],
    ]
    with safe_open(paths["safetensors"], "pt") as opened:
        description = json.loads(opened.metadata()["resnet_reg_ext.compact"])
    assert description["layers"] == content["layers"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_or_changed_file_is_refused_or_loads(tmp_path, saved, suffix):
    whole = saved[1][suffix].read_bytes()
    file = tmp_path / f"model.{suffix}"

    @settings(max_examples=10)
    @given(st.integers(0, len(whole) - 1))
    def truncated(length):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"load_compact: .*model.{suffix} "):
            load_compact(file)

    @settings(max_examples=10)
    @given(st.integers(0, 3000), st.binary(min_size=1, max_size=8))
    def changed(at, data):
        file.write_bytes(whole[:at] + data + whole[at + len(data) :])
        said = f"load_compact: {file} "  # what isn't refused loads: a weight was changed
        try:
            load_compact(file)
        except ValueError as error:
            said = str(error)
        assert said.startswith(f"load_compact: {file} ")

    truncated()
    changed()


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def _with(content, **changes):
    content = {**content, "layers": dict(content["layers"]), **changes}
    content["state_dict"] = dict(content["state_dict"])
    return content


def _layer(content, name, value):
    content = _with(content)
    content["layers"][name] = value
    return content


def _tensor(content, name, value):
    content = _with(content)
    content["state_dict"][name] = value
    return content


FC = "classifier.1"


def _narrower(content, name):
    """A layer that is consistent in itself but doesn't fit the others."""
    content = _with(content)
    (rows, *rest), groups = content["layers"][name]
    content["layers"][name] = [[rows - 1, *rest], groups]
    for key, value in content["state_dict"].items():
        if key.startswith(f"{name}.") and value.dim():
            content["state_dict"][key] = value[:-1].clone()
    return content


HOSTILE = {
    "nothing": (lambda c: {}, "isn't a compact model"),
    "a list": (lambda c: [1], "isn't a compact model"),
    "a state dict": (lambda c: c["state_dict"], "isn't a compact model"),
    "code": (lambda c: _with(c, architecture=Evil()), "isn't a compact model"),
    "another version": (lambda c: _with(c, version=2), "has version 2 of the format"),
    "no architecture": (lambda c: _with(c, architecture=3), "description isn't one of layers"),
    "unknown": (lambda c: _with(c, architecture="__init__"), "architecture is '__init__'"),
    "another's": (lambda c: _with(c, architecture="resnet18"), "is damaged: features"),
    "no layer": (lambda c: _layer(c, "nowhere", [[1], 1]), "nowhere is no layer"),
    "negative": (lambda c: _layer(c, FC, [[-1, 2], 1]), "description isn't one of layers"),
    "fractions": (lambda c: _layer(c, FC, [[1.5, 2], 1]), "description isn't one of layers"),
    "huge": (lambda c: _layer(c, FC, [[2**62, 2**62], 1]), "is damaged: "),
    "flat": (lambda c: _layer(c, FC, [[10], 1]), "has 1 dimensions, must have 2"),
    "groups": (lambda c: _layer(c, "features.0.0", [[5, 3, 3, 3], 7]), "groups that don't fit"),
    "kernel": (lambda c: _layer(c, "features.0.0", [[5, 3, 9, 9], 1]), "kernel or groups"),
    "block": (lambda c: _with(c, shortcuts=["features.0"]), "features.0 is no residual block"),
    "odd block": (lambda c: _with(c, shortcuts=[3]), "description isn't one of layers"),
    "odd layers": (lambda c: _with(c, layers=[1]), "is damaged|can't|isn't"),
    "shape": (lambda c: _tensor(c, f"{FC}.bias", torch.ones(3)), f"{FC}.bias is .3,., must be"),
    "integers": (lambda c: _tensor(c, f"{FC}.bias", torch.ones(10).long()), "is of torch.int64"),
    "more": (lambda c: _tensor(c, "more", torch.ones(3)), "more is missing or unknown"),
    "number": (lambda c: _tensor(c, f"{FC}.bias", 3), "bias is no ordinary tensor"),
    "sparse": (
        lambda c: _tensor(c, f"{FC}.bias", torch.ones(10).to_sparse()),
        "bias is no ordinary tensor",
    ),
    "stride 0": (
        lambda c: _tensor(c, f"{FC}.bias", torch.ones(1).expand(10)),
        "has fewer values than its shape says",
    ),
    "conv doesn't fit": (lambda c: _narrower(c, "features.0.0"), "is damaged: "),
    "norm doesn't fit": (lambda c: _narrower(c, "features.0.1"), "a norm of"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_content_is_refused(tmp_path, saved, kind, capsys):
    change, named = HOSTILE[kind]
    content = torch.load(saved[1]["pt"], weights_only=True)
    file = tmp_path / "a.pt"
    if kind == "odd layers":
        content["layers"] = [1]
        torch.save(content, file)
    else:
        torch.save(change(content), file)
    with pytest.raises(ValueError, match=named) as raised:
        load_compact(file)
    assert str(raised.value).startswith(f"load_compact: {file}")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"format": 3}', "[" * 100_000])
def test_hostile_descriptions_in_safetensors_are_refused(tmp_path, text):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, file, {"resnet_reg_ext.compact": text})
    with pytest.raises(ValueError, match=r"load_compact: .*a.safetensors isn't a compact model"):
        load_compact(file)


def test_special_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_compact(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="is not a regular file"):
        load_compact(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for each in (load_compact, lambda file: save_compact(file, nn.Linear(1, 1))):
        with pytest.raises(ValueError, match="pipe is not a regular file"):
            each(tmp_path / "pipe")


def test_a_failed_save_leaves_the_old_file(tmp_path, saved):
    file = tmp_path / "model.pt"
    file.write_bytes(b"old")
    broken = copy.deepcopy(saved[0])
    broken.features[0][0].weight = nn.Parameter(broken.features[0][0].weight.to("meta"))
    with pytest.raises(ValueError, match=r"features.0.0.weight isn't a tensor with values"):
        save_compact(file, broken, architecture="mobilenet_v2")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pt"]
