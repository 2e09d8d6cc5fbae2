"""A compact model in ONNX gives what it gives in torch."""

import pytest
import torch
from networks import SIDE, Tiny, with_statistics

from resnet_reg_ext import remove

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def tiny():
    return with_statistics(Tiny())


def resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return with_statistics(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10))


@pytest.mark.parametrize("build", [tiny, resnet])
def test_onnxruntime_gives_the_same(tmp_path, build):
    model = remove(build().eval(), torch.rand(1, 3, SIDE, SIDE), share=0.6).model
    x = torch.rand(3, 3, SIDE, SIDE)
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model.eval(),
        (x,),
        file,
        input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (x, x[:2]):
        (got,) = session.run(None, {"images": batch.numpy()})
        expected = model(batch).detach()
        error = (torch.from_numpy(got) - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max()
