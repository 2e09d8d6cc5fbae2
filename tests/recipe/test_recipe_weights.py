"""Initial weights from files, and stages that are frozen."""

import torch
import torchvision
from test_recipe import TINY, refused

from resnet_reg_ext.recipe.model import Classifier, regularised
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.weights import load_weights


def test_weights_from_a_file(tmp_path, capsys):
    source = torchvision.models.resnet50(num_classes=7)
    state = {name: value.half() for name, value in source.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    classifier = Classifier(Run(), ["a", "b"])
    head = classifier.model.fc.weight.clone()
    said = load_weights(classifier, str(tmp_path / "w.pt"))
    assert "head for 7 classes is replaced by a random one for 2" in said
    assert torch.equal(classifier.model.conv1.weight, source.conv1.weight.half().float())
    assert torch.equal(classifier.model.fc.weight, head)

    from safetensors.torch import save_file

    save_file(source.state_dict(), tmp_path / "w.safetensors")
    seven = Classifier(Run(), list("abcdefg"))
    assert "with its class head" in load_weights(seven, str(tmp_path / "w.safetensors"))
    assert torch.equal(seven.model.fc.weight, source.fc.weight)

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pt")
    out = tmp_path / "out"
    command = ["train", *TINY, "--out", str(out), "--weights"]
    assert "is not a ResNet-50's" in refused([*command, str(tmp_path / "other.pt")], capsys)
    assert "is not a file" in refused([*command, str(tmp_path / "none.pt")], capsys)
    (tmp_path / "broken.safetensors").write_bytes(b"{")
    assert "holds no weights" in refused([*command, str(tmp_path / "broken.safetensors")], capsys)
    assert not out.exists()


def test_frozen_stages_do_not_learn_nor_count():
    classifier = Classifier(Run(freeze="layer1"), ["a", "b"]).train()
    model = classifier.model
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    stages = ("conv1.", "bn1.", "layer1.")
    assert frozen == [n for n, _ in model.named_parameters() if n.startswith(stages)]
    assert not model.bn1.training
    assert not model.layer1[0].bn1.training
    assert model.layer2[0].bn1.training
    assert not any(layer.name.startswith(stages) for layer in regularised(classifier).layers)
