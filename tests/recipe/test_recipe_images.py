"""One image file: shown as a viewer shows it, or refused by name."""

import os
import socket
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_recipe_data import make_images, refused, run_for

from resnet_reg_ext.recipe.data import load_images
from resnet_reg_ext.recipe.images import inspect_image, load_image

NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)

# How a camera stores a picture with each EXIF orientation (the standard's "0th row, 0th column").
STORED = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: np.rot90(shown, 1),
    7: lambda shown: shown[::-1, ::-1].swapaxes(0, 1),
    8: lambda shown: np.rot90(shown, -1),
}


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def shown(path):
    assert inspect_image(path).fault == ""
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def icc_profile(space, tags, kind=b"mntr", connection=b"XYZ "):
    """An ICC profile of version 2 by the specification: header, table of tags, tags."""
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    size = 128 + len(table) + len(body)
    white = struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    head = struct.pack(">I4sI4s4s4s", size, b"\0" * 4, 0x02100000, kind, space, connection)
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + white
    return head.ljust(128, b"\0") + table + body


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
PRIMARIES = [getattr(SRGB.profile, f"{name}_colorant")[0] for name in ("red", "green", "blue")]
WHITE = {b"wtpt": xyz(0.9642, 1.0, 0.8249)}
LINEAR_RGB = icc_profile(
    b"RGB ",
    {
        **WHITE,
        **{name: xyz(*p) for name, p in zip((b"rXYZ", b"gXYZ", b"bXYZ"), PRIMARIES, strict=True)},
        **{name: gamma(1.0) for name in (b"rTRC", b"gTRC", b"bTRC")},
    },
)
SWAPPED_RGB = icc_profile(
    b"RGB ",
    {
        **WHITE,
        **{name: xyz(*p) for name, p in zip((b"gXYZ", b"rXYZ", b"bXYZ"), PRIMARIES, strict=True)},
        **{name: gamma(2.2) for name in (b"rTRC", b"gTRC", b"bTRC")},
    },
)
LINEAR_GREY = icc_profile(b"GRAY", {**WHITE, b"kTRC": gamma(1.0)})


def encoded(linear):
    """sRGB's curve (IEC 61966-2-1), from and to levels of 0 to 255."""
    x = np.asarray(linear) / 255
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_the_exif_orientation_is_applied(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](NOISE))
    options = {"lossless": True} if name == "x.webp" else {}
    path = save(Image.fromarray(stored), tmp_path / name, exif=exif, **options)
    assert np.array_equal(shown(path), NOISE)


def test_the_orientation_may_stand_in_xmp_alone(tmp_path):
    xmp = b"<x:xmpmeta><rdf:Description tiff:Orientation='6' tiff:Orientation=\"6\"/></x:xmpmeta>"
    grey = np.repeat(np.linspace(0, 255, 24, dtype=np.uint8)[:, None], 16, 1)
    image = Image.fromarray(np.ascontiguousarray(np.rot90(grey, 1)))
    path = save(image, tmp_path / "x.jpg", xmp=xmp, quality=100)
    assert shown(path).shape == (24, 16, 3)


@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"junk" * 9, b"Exif\0\0MM\0*", b"x"])
def test_exif_that_makes_no_sense_leaves_an_image_as_stored(exif, tmp_path):
    plain = save(Image.fromarray(NOISE), tmp_path / "plain.jpg")
    assert np.array_equal(
        shown(save(Image.fromarray(NOISE), tmp_path / "x.jpg", exif=exif)), shown(plain)
    )


@pytest.mark.parametrize(("mode", "name"), [("LA", "x.png"), ("RGBA", "x.webp"), ("RGBA", "x.tif")])
def test_what_is_transparent_lies_on_white(mode, name, tmp_path):
    alpha = np.zeros((12, 16), dtype=np.uint8)
    alpha[:, 4:8], alpha[:, 8:] = 128, 255
    image = Image.fromarray(NOISE).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    options = {"lossless": True, "exact": True} if name == "x.webp" else {}
    pixels = shown(save(image, tmp_path / name, **options)).astype(float)
    colours = np.asarray(Image.fromarray(NOISE).convert(mode).convert("RGB"))
    share = alpha[..., None] / 255
    # Rounded to whole levels.
    assert abs(pixels - (share * colours + (1 - share) * 255)).max() <= 0.5 + 1e-9
    assert (pixels[:, :4] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_one_colour_may_be_transparent(mode, tmp_path):
    image = Image.new(mode, (12, 12), 0)
    key = (0, 0, 0) if mode == "RGB" else 0
    path = save(image, tmp_path / "x.png", transparency=key)
    assert (shown(path) == 255).all()
    assert (shown(save(image, tmp_path / "opaque.png")) == 0).all()


def test_an_opaque_alpha_channel_changes_no_bit(tmp_path):
    image = Image.fromarray(NOISE)
    image.putalpha(255)
    assert np.array_equal(shown(save(image, tmp_path / "x.png")), NOISE)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_colours_are_converted_to_srgb(name, tmp_path):
    options = {"lossless": True} if name == "x.webp" else {}
    image = Image.fromarray(NOISE)
    linear = shown(save(image, tmp_path / name, icc_profile=LINEAR_RGB, **options))
    # Rounded to whole levels; a profile's numbers have 16 binary places.
    assert abs(linear - encoded(NOISE)).max() <= 0.6
    swapped = shown(save(image, tmp_path / f"2{name}", icc_profile=SWAPPED_RGB, **options))
    curve = 255 * (NOISE / 255) ** (round(2.2 * 256) / 256)
    assert abs(swapped[..., [1, 0, 2]] - encoded(curve)).max() <= 0.6


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_levels_are_converted_to_srgb(mode, tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(levels).convert(mode)
    pixels = shown(save(image, tmp_path / "x.png", icc_profile=LINEAR_GREY))
    assert abs(pixels - encoded(levels)[..., None]).max() <= 0.6


def only_black_prints():
    """A profile of a printer whose cyan, magenta and yellow don't show (a table of lut8Type)."""
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    # L, a, b at all corners of CMYK, K varying fastest.
    corners = bytes([255, 128, 128, 0, 128, 128]) * 8
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * identity + corners + 3 * identity
    return icc_profile(b"CMYK", {**WHITE, b"A2B0": table}, b"prtr", b"Lab ")


@pytest.mark.parametrize("name", ["x.jpg", "x.tif"])
def test_inks_are_converted_by_their_profile(name, tmp_path):
    profile = only_black_prints()
    for inks, level in (((255, 255, 0, 0), 255), ((0, 255, 255, 255), 0), ((90, 0, 0, 0), 255)):
        image = Image.new("CMYK", (8, 8), inks)
        pixels = shown(save(image, tmp_path / name, icc_profile=profile))
        # Lab of 8 bits has its white and black a level off.
        assert abs(pixels.astype(int) - level).max() <= 2


def test_orientation_profile_and_alpha_go_together(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.ascontiguousarray(STORED[6](NOISE)))
    alpha = np.full((12, 16), 255, dtype=np.uint8)
    alpha[:6] = 0
    image.putalpha(Image.fromarray(np.ascontiguousarray(np.rot90(alpha, 1))))
    pixels = shown(save(image, tmp_path / "x.png", exif=exif, icc_profile=LINEAR_RGB))
    assert (pixels[:6] == 255).all()
    assert abs(pixels[6:] - encoded(NOISE[6:])).max() <= 0.6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_profile_that_is_srgb_changes_no_bit(mode, tmp_path):
    image = Image.fromarray(NOISE).convert(mode)
    path = save(image, tmp_path / "x.png", icc_profile=SRGB.tobytes())
    assert np.array_equal(shown(path), np.asarray(image.convert("RGB")))
    assert inspect_image(path).notes == ()


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile"),
        ("RGB", LINEAR_RGB[:200]),
        ("RGB", LINEAR_GREY),
        ("CMYK", LINEAR_RGB),
        ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
    ],
)
def test_a_profile_that_cannot_be_applied_is_noted(mode, profile, tmp_path):
    make_images(tmp_path, ["a", "b"])
    image = Image.fromarray(NOISE).convert(mode)
    path = save(image, tmp_path / "a" / "x.tif", icc_profile=profile)
    assert np.array_equal(shown(path), np.asarray(image.convert("RGB")))
    (note,) = load_images(run_for(tmp_path, val_fraction=0.5)).notes
    assert note == (
        f"{tmp_path}: 1 image with a colour profile that can't be applied and is ignored: {path}"
    )


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_that_is_said(form, tmp_path):
    make_images(tmp_path, ["a", "b"])
    first, *others = (Image.new("RGB", (12, 12), colour) for colour in ("red", "blue", "green"))
    options = {"lossless": True} if form == "WEBP" else {}
    for name in ("x.png", "y.png"):  # the content decides, not the suffix
        save(
            first,
            tmp_path / "a" / name,
            format=form,
            save_all=True,
            append_images=others,
            **options,
        )
    assert (shown(tmp_path / "a" / "x.png") == (255, 0, 0)).all()
    (note,) = load_images(run_for(tmp_path, val_fraction=0.5)).notes
    assert note == (
        f"{tmp_path}: 2 images with several frames or pages, of which the first is taken: "
        f"{tmp_path / 'a' / 'x.png'} and others"
    )


def test_a_photograph_with_a_second_picture_beside_it_is_one_image(tmp_path):
    first, second = Image.new("RGB", (12, 12)), Image.new("RGB", (6, 6), "white")
    path = save(first, tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[second])
    assert inspect_image(path).notes == ()
    assert (shown(path) == 0).all()


def deep_tiff(samples):
    """An uncompressed TIFF of one pixel with 16 bits a sample."""
    bits = struct.pack(f"<{samples}H", *[16] * samples)
    entries = [
        (256, 3, 1, 1),
        (257, 3, 1, 1),
        (258, 3, samples, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8 + len(bits)),
        (277, 3, 1, samples),
        (279, 4, 1, 2 * samples),
    ] + [(338, 3, 1, 2)] * (samples == 4)
    pixel = struct.pack(f"<{samples}H", *[0x1234] * samples)
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(bits) + len(pixel))
    return head + bits + pixel + ifd + b"\0" * 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tif", deep_tiff(3)),
        ("x.tif", deep_tiff(4)),
        ("x.ppm", b"P6 1 1 65535\n" + b"\x12\x34" * 3),
        ("x.ppm", b"P6 1 1 1023\n" + b"\x02\x34" * 3),
        ("x.ppm", b"P3 1 1 300\n255 256 300\n"),
    ],
)
def test_colours_of_more_than_8_bits_are_refused(name, content, tmp_path):
    make_images(tmp_path, ["a", "b"])
    path = tmp_path / "a" / name
    path.write_bytes(content)
    run = run_for(tmp_path, val_fraction=0.5)
    said = refused(run)
    assert str(path) in said
    assert "more than 8 bits" in said
    assert "more than 8 bits" in load_images(replace(run, corrupt="skip")).notes[0]


def test_levels_below_255_are_scaled(tmp_path):
    path = tmp_path / "x.ppm"
    path.write_bytes(b"P6 1 1 100\n" + bytes([0, 50, 100]))
    assert shown(path).tolist() == [[[0, 128, 255]]]


def make_socket(path):
    """A socket's path may have about 100 characters only."""
    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as server:
        patch.chdir(path.parent)
        server.bind(path.name)


def fifo_behind_a_link(path):
    os.mkfifo(path.with_suffix(".fifo"))
    path.symlink_to(path.with_suffix(".fifo"))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_socket, "a socket"),
        (fifo_behind_a_link, "a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
    ],
)
def test_what_is_no_regular_file_is_never_opened(make, kind, tmp_path):
    make_images(tmp_path, ["a", "b"])
    path = tmp_path / "a" / "x.png"
    make(path)
    run = run_for(tmp_path, val_fraction=0.5)
    said = refused(run)
    assert str(path) in said
    assert kind in said
    images = load_images(replace(run, corrupt="skip"))
    assert len(images.train) + len(images.validation) == 12
    assert images.notes[0].startswith(f"skipped {path}: ")
