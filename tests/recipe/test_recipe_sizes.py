"""Images of odd sizes: small files that blow up are refused by name, or cost little."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_recipe_data import make_images, run_for
from test_recipe_images import NOISE, save, shown
from torchvision.transforms import v2

from resnet_reg_ext.recipe.data import load_images
from resnet_reg_ext.recipe.images import inspect_image
from resnet_reg_ext.recipe.loaders import ImageDataset, transform


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_png(side):
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    row = b"\0" * (1 + (side + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "content",
    [
        huge_png(10_000),
        huge_png(20_000),
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
        + b"\x08\0",
        b"BM" + struct.pack("<IHHIIiiHH", 100, 0, 0, 54, 40, 50_000, 50_000, 1, 24) + b"\0" * 24,
    ],
    ids=["PNG of 100 MP", "PNG of 400 MP", "GIF", "BMP"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_huge_size_is_refused_before_it_is_decoded(content, tmp_path, monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    make_images(tmp_path, ["a", "b"])
    path = tmp_path / "a" / "x.png"
    path.write_bytes(content)
    monkeypatch.setattr(Image.Image, "load", decode)
    fault = inspect_image(path).fault
    assert "decompression bomb" in fault
    assert len(content) < 1_000_000


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_photograph_is_no_bomb(tmp_path, monkeypatch):
    path = save(Image.fromarray(NOISE), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", NOISE.size // 3 - 1)
    assert np.array_equal(shown(path), NOISE)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(1, 300, 64), (300, 2, 64), (7, 701, 49), (10, 1000, 40)]
)
def test_the_middle_of_a_thin_image_is_that_of_the_whole(height, width, size):
    """Where the shorter side divides the size, cutting first changes nothing at all."""
    pixels = torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    whole = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    scale = [v2.ToDtype(torch.float32, scale=True)]
    expected = v2.Compose([v2.ToImage(), whole, *scale])(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    found = transform(size, "none")(image) * std[:, None, None] + mean[:, None, None]
    # The normalisation and its inverse, in float32.
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("augment", ["none", "shift", "standard"])
@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1), (3, 900_001)])
def test_a_thin_image_costs_little(size, augment, tmp_path):
    """Resized whole, it would have hundreds of GB."""
    make_images(tmp_path, ["a", "b"])
    save(Image.new("RGB", size, "white"), tmp_path / "a" / "x.png")
    split = load_images(run_for(tmp_path, val_fraction=0.5)).train
    split = replace(split, images=[tmp_path / "a" / "x.png"], labels=torch.tensor([0]))
    pixels = ImageDataset(split, 512, augment)[0, 0][0]
    assert pixels.shape == (3, 512, 512)
    assert torch.equal(pixels, pixels[:, :1, :1].expand_as(pixels))


@pytest.mark.parametrize("size", [(640, 10), (64, 64), (33, 100), (700, 300), (4000, 40)])
def test_ordinary_images_keep_their_bits(size):
    image = Image.effect_noise(size, 60).convert("RGB")
    steps = [v2.ToImage(), v2.Resize(32, antialias=True), v2.CenterCrop(32)]
    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    plain = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), normalise])
    assert torch.equal(transform(32, "none")(image), plain(image))
