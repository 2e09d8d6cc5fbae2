"""Patches: the fine-tuned model again to the bit, in few bytes; damaged and hostile files."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from resnet_reg_ext import ProxSGD, apply_patch, param_groups, save_patch, sparsity


def net(classes=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)
    ).to(memory_format=torch.channels_last)


def bits(state):
    return {
        name: (t.dtype, tuple(t.shape), bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy()))
        for name, t in state.items()
    }


@pytest.fixture
def tuned():
    """A start and the model that was tuned from it, a few weights moved."""
    start, model = net(), net()
    optimizer = ProxSGD(
        param_groups(model, l1=2e-2, toward="start"), lr=0.05, weight_decay=1e-3, momentum=0.9
    )
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        images = torch.randn(8, 3, 5, 5, generator=generator)
        nn.functional.cross_entropy(model(images), torch.arange(8) % 5).backward()
        optimizer.step()
    return start, model, optimizer


def test_a_patch_over_its_start_is_the_tuned_model_bit_by_bit(tuned, tmp_path):
    start, model, optimizer = tuned
    file = tmp_path / "tuned.safetensors"
    made = save_patch(file, model, start)
    moved = sum(layer.size - layer.zeros for layer in sparsity(optimizer).layers if layer.at_start)
    rest = sum(int((b != a).sum()) for a, b in _others(start, model, optimizer))
    assert made.changed == moved + rest
    assert made.file_bytes == file.stat().st_size
    assert 0 < moved < 0.9 * made.size

    before = bits(start.state_dict())
    assert bits(apply_patch(start.state_dict(), file)) == bits(model.state_dict())
    assert bits(start.state_dict()) == before
    apply_patch(start, file)
    assert bits(start.state_dict()) == bits(model.state_dict())


def _others(start, model, optimizer):
    """Tensors that aren't pulled towards a start: norms, biases and buffers."""
    pulled = {id(p) for g in optimizer.param_groups if g["toward"] == "start" for p in g["params"]}
    kept = {name for name, p in model.named_parameters() if id(p) in pulled}
    one, other = start.state_dict(), model.state_dict()
    return [(one[name], other[name]) for name in one if name not in kept]


@pytest.mark.parametrize("changed", [0, 1, 30, 31, 32, 500, 1000], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str
)
def test_every_dtype_and_share(dtype, changed, tmp_path):
    """Of 1000 elements, 31 indices of 4 bytes take less than a mask of 125 bytes."""
    torch.manual_seed(changed)
    old = torch.randn(10, 100).mul(9).to(dtype)
    new = old.clone()
    places = torch.randperm(1000)[:changed]
    flat = new.view(-1)
    flat[places] = ~flat[places] if dtype is torch.bool else flat[places] + 1
    made = save_patch(tmp_path / "p", {"w": new}, {"w": old})
    assert made.changed == changed
    with safe_open(tmp_path / "p", "pt") as file:
        kinds = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118
    places_by = {0: set(), 1000: {"values"}}.get(
        changed, {"values", "indices" if changed <= 31 else "mask"}
    )
    assert kinds == places_by
    assert bits(apply_patch({"w": old}, tmp_path / "p")) == bits({"w": new})


def test_zeros_and_nans_are_told_apart_by_their_bits(tmp_path):
    old = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf")])
    new = torch.tensor([-0.0, -0.0, 1.0, 0.0, float("nan")])
    new.view(torch.int32)[3] = old.view(torch.int32)[3].item() ^ 1  # another payload
    assert save_patch(tmp_path / "p", {"w": new}, {"w": old}).changed == 3
    assert bits(apply_patch({"w": old}, tmp_path / "p")) == bits({"w": new})


def test_a_new_head_and_removed_tensors(tmp_path):
    old, new = net(5).state_dict(), net(7).state_dict()
    old["extra"], new["added"] = torch.ones(2), torch.zeros((), dtype=torch.int64)
    save_patch(tmp_path / "p", new, old)
    assert bits(apply_patch(old, tmp_path / "p")) == bits(new)
    # The old head plays no part: a start with another one will do.
    other = {**old, "4.weight": torch.zeros(1), "4.bias": torch.zeros(1)}
    assert bits(apply_patch(other, tmp_path / "p")) == bits(new)
    model = net(5)
    before = bits(model.state_dict())
    with pytest.raises(
        ValueError, match="doesn't fit the model: only the patch's result has added"
    ):
        apply_patch(model, tmp_path / "p")
    assert bits(model.state_dict()) == before


@pytest.mark.one_torch
def test_resnet50_with_95_percent_of_its_weights_at_the_start(tmp_path):
    import torchvision

    with torch.device("meta"):
        shapes = {n: p.shape for n, p in torchvision.models.resnet50().named_parameters()}
    generator = torch.Generator().manual_seed(0)
    old = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    new = {n: t + (torch.rand(t.shape, generator=generator) < 0.05) for n, t in old.items()}
    made = save_patch(tmp_path / "p.safetensors", new, old)
    size = sum(t.numel() for t in old.values())
    assert made.size == size == 25_557_032
    assert 0.045 * size < made.changed < 0.055 * size
    assert made.file_bytes <= 1.3 * 4 * made.changed + 1.5 / 8 * size
    result = apply_patch(old, tmp_path / "p.safetensors")
    assert all(torch.equal(result[name], value) for name, value in new.items())


@pytest.mark.parametrize("change", ["a bit of an unchanged tensor", "shape", "missing", "dtype"])
def test_another_start_is_refused(change, tuned, tmp_path):
    start, model, _ = tuned
    save_patch(tmp_path / "p", model, start)
    state = {name: t.clone() for name, t in start.state_dict().items()}
    if change == "shape":
        state["0.weight"] = state["0.weight"].flatten()
    elif change == "dtype":
        state["0.weight"] = state["0.weight"].half()
    elif change == "missing":
        del state["0.weight"]
    else:
        state["1.running_var"].view(torch.int32)[3] += 1
    before = bits(state)
    with pytest.raises(ValueError, match=r"p is a patch of another start: .* to the bit"):
        apply_patch(state, tmp_path / "p")
    assert bits(state) == before


def test_no_damage_goes_unnoticed(tuned, tmp_path):
    """Cut anywhere, or with a byte changed: an error that names the file, or the right result."""
    start, model, _ = tuned
    file = tmp_path / "p.safetensors"
    save_patch(file, model, start)
    content, wanted, before = file.read_bytes(), bits(model.state_dict()), bits(start.state_dict())
    chance = random.Random(0)
    damaged = [content[: chance.randrange(len(content))] for _ in range(60)]
    for _ in range(240):
        at = chance.randrange(len(content))
        damaged.append(
            content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
        )
    refused = 0
    for bad in [b"", b"\0" * 64, *damaged]:
        file.write_bytes(bad)
        error, result = "", None
        try:
            result = apply_patch(start.state_dict(), file)
        except ValueError as raised:
            error = str(raised)
        assert str(file) in error if result is None else bits(result) == wanted
        refused += result is None
        assert bits(start.state_dict()) == before
    assert refused > 250  # of 302: the rest is spaces and the like


def patched_by_hand(file, tensors, **changes):
    """A file that says it is a patch of {"w": zeros(10)}."""
    save_patch(file, {"w": torch.ones(10)}, {"w": torch.zeros(10)})
    with safe_open(file, "pt") as content:
        description = json.loads(content.metadata()["resnet_reg_ext.patch"])
    text = changes.pop("text", None) or json.dumps(description | changes)
    save_file(tensors, file, {"resnet_reg_ext.patch": text})


F, I32, U8 = torch.ones, torch.int32, torch.uint8
HOSTILE = {
    "index beyond": {"values/w": F(1), "indices/w": torch.tensor([10], dtype=I32)},
    "index below": {"values/w": F(1), "indices/w": torch.tensor([-1], dtype=I32)},
    "index twice": {"values/w": F(2), "indices/w": torch.tensor([3, 3], dtype=I32)},
    "indices of floats": {"values/w": F(1), "indices/w": F(1)},
    "more values than places": {"values/w": F(3), "indices/w": torch.tensor([1], dtype=I32)},
    "mask beyond": {"values/w": F(1), "mask/w": torch.tensor([0, 128], dtype=U8)},
    "short mask": {"values/w": F(1), "mask/w": torch.tensor([1], dtype=U8)},
    "fewer values than bits": {"values/w": F(1), "mask/w": torch.tensor([3, 0], dtype=U8)},
    "values of another dtype": {"values/w": F(10, dtype=torch.float64)},
    "too few whole values": {"values/w": F(9)},
    "places without values": {"indices/w": torch.tensor([1], dtype=I32)},
    "an unknown tensor": {"values/v": F(1)},
    "an unknown kind": {"w": F(10)},
    "other values": {"values/w": torch.zeros(10)},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case, tmp_path):
    file = tmp_path / "p.safetensors"
    patched_by_hand(file, HOSTILE[case])
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(10))})
    with pytest.raises(ValueError, match=r"p.safetensors is damaged: \S+"):
        apply_patch(model, file)
    assert (model["w"] == 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "{"},
        {"text": "[" * 100_000},
        {"text": "null"},
        {"text": '"' + "x" * 1000},
        {"format": "another"},
        {"version": 2},
        {"version": None},
        {"start": 5},
        {"removed": {"w": 1}},
        {"removed": [1]},
    ],
    ids=lambda c: str(c)[:30],
)
def test_a_description_of_something_else_is_refused(changes, tmp_path):
    patched_by_hand(tmp_path / "p.safetensors", {"values/w": F(10)}, **changes)
    with pytest.raises(ValueError, match=r"p.safetensors (isn't a patch|is damaged|has version)"):
        apply_patch({"w": torch.zeros(10)}, tmp_path / "p.safetensors")


def test_what_is_no_file_or_no_state_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        apply_patch({}, tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        apply_patch({}, tmp_path / "pipe")
    with pytest.raises(ValueError, match="save_patch: start is a list"):
        save_patch(tmp_path / "p", {}, [])
    file = tmp_path / "p"
    save_patch(file, {"w": torch.ones(3)}, {"w": torch.zeros(3)})
    before = file.read_bytes()
    for odd in (torch.ones(3, device="meta"), torch.eye(3).to_sparse(), "w", torch.ones(3) * 1j):
        with pytest.raises(ValueError, match="save_patch: model: w is"):
            save_patch(file, {"w": odd}, {"w": torch.zeros(3)})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
