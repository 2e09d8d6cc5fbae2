"""``resnet-reg patch``: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_reg_ext.cli import main


def network(seed: int, classes: int = 4) -> dict[str, torch.Tensor]:
    """The names that a ResNet is told by, and few weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv1.weight": (8, 3, 7, 7),
        "layer1.0.conv1.weight": (8, 8, 1, 1),
        "fc.weight": (classes, 8),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Weights as published, a checkpoint as `train` writes it, and what is in that."""
    start = network(0)
    tuned = {name: value.clone() for name, value in network(0).items()}
    tuned["conv1.weight"].view(-1)[5:25] += 1
    tuned["fc.weight"] = network(1, classes=3)["fc.weight"]
    save_file(start, tmp_path / "start.safetensors")
    inside = {f"model.{name}": value for name, value in tuned.items()}
    torch.save({"state_dict": inside, "epoch": 3}, tmp_path / "best.ckpt")
    return tmp_path / "start.safetensors", tmp_path / "best.ckpt", tuned


@pytest.mark.parametrize("out", ["again.safetensors", "again.pt"])
def test_a_checkpoint_as_a_patch_and_back(
    files: tuple[Path, Path, dict[str, torch.Tensor]],
    out: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, checkpoint, tuned = files
    assert main(["patch", "save", str(checkpoint), "--start", str(start)]) == 0
    patch = tmp_path / "patch.safetensors"
    said = capsys.readouterr().out
    assert "44 of 1,264 values (3.48%) differ" in said  # 20, and the new head
    assert f"{patch.stat().st_size:,} bytes" in said
    arguments = ["patch", "apply", str(patch), "--start", str(start), "--out", str(tmp_path / out)]
    assert main(arguments) == 0
    read = load_file if out.endswith("safetensors") else torch.load
    result = read(tmp_path / out)
    assert result.keys() == tuned.keys()
    assert all(torch.equal(result[name], value) for name, value in tuned.items())


def test_weights_in_half_precision_are_the_start_that_train_makes_of_them(
    files: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    _, _, tuned = files
    half = {name: value.half() for name, value in network(0).items()}
    save_file(half, tmp_path / "half.safetensors")
    tuned |= {name: half[name].float() for name in ("conv1.weight", "layer1.0.conv1.weight")}
    save_file(tuned, tmp_path / "tuned.safetensors")
    arguments = ["--start", str(tmp_path / "half.safetensors")]
    out = tmp_path / "p.safetensors"
    tuned_file = str(tmp_path / "tuned.safetensors")
    assert main(["patch", "save", tuned_file, *arguments, "--out", str(out)]) == 0
    assert set(load_file(out)) == {"whole/fc.weight"}


@pytest.mark.parametrize("case", ["another start", "no patch", "no weights", "missing"])
def test_bad_input_is_one_sentence_and_nothing_is_written(
    case: str,
    files: tuple[Path, Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, checkpoint, _ = files
    assert main(["patch", "save", str(checkpoint), "--start", str(start)]) == 0
    patch = tmp_path / "patch.safetensors"
    if case == "another start":
        save_file(network(9), start)
        said = "is a patch of another start"
    elif case == "no patch":
        patch = start
        said = "isn't a patch"
    elif case == "no weights":
        start = tmp_path / "text.pt"
        start.write_text("nothing")
        said = "holds no weights"
    else:
        patch = tmp_path / "none"
        said = "none: No such file"
    capsys.readouterr()
    arguments = ["patch", "apply", str(patch), "--start", str(start)]
    assert main([*arguments, "--out", str(tmp_path / "out.pt")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resnet-reg patch: ")
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out.pt").exists()
