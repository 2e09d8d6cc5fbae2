"""One image file as a viewer shows it: upright, in sRGB, on white; or why it can't be used."""

from __future__ import annotations

import io
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

FIRST_FRAME = "several frames or pages, of which the first is taken"
BAD_PROFILE = "a colour profile that can't be applied and is ignored"

# An ICC profile within 2 of 255 levels of sRGB is taken for sRGB, so that the many images which
# merely say that they are in sRGB keep their bits.
_SRGB_TOLERANCE = 2
_MODES_OF_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
_GREY_MODES = ("1", "L", "LA", "La")
_BITS_PER_SAMPLE = 258  # TIFF's tag
# Photographs have 1 to 8 pixels a byte, black scans some dozens; a decompression bomb has 300
# (a PNG of one colour) and more.
_BOMB_PIXELS_PER_BYTE = 100
_SPECIAL_FILES = {
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_one_large_image = threading.Lock()


@dataclass(frozen=True)
class Inspection:
    """The result of decoding an image once."""

    fault: str = ""
    """The reason why it can't be used; "" if it can."""
    notes: tuple[str, ...] = ()
    """Which of ``FIRST_FRAME`` and ``BAD_PROFILE`` it has."""


def load_image(path: Path) -> Image.Image:
    """The image as a viewer shows it, as a PIL image of mode RGB.

    The EXIF orientation is applied (``PIL.ImageOps.exif_transpose``), an embedded ICC profile is
    converted to sRGB (``PIL.ImageCms``), and transparent pixels are composited on white. Of several
    frames or pages the first is taken.

    Raises:
        ValueError: the file is no regular file, has more than 8 bits a channel, or looks like a
            decompression bomb.
        Exception: Pillow's decoders raise many kinds.
    """
    with _decoded(path) as image:
        return _as_shown(image)[0]


def inspect_image(path: Path) -> Inspection:
    """Decodes an image as :func:`load_image` does, and reports what the user should know."""
    try:
        with _decoded(path) as image:
            notes = _as_shown(image)[1]
            # A photograph with a preview or a depth map beside it (MPO) is shown as one picture.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                notes = (FIRST_FRAME, *notes)
    except FileNotFoundError:
        return Inspection("it is a link that leads nowhere")
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = getattr(error, "strerror", None) or str(error)
        return Inspection(" ".join(reason.split()) or type(error).__name__)
    return Inspection(notes=notes)


@contextmanager
def _decoded(path: Path) -> Iterator[Image.Image]:
    """Opens and decodes a file; what would block, be cut or use up memory is refused before."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO blocks until someone writes to it
        kind = _SPECIAL_FILES.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise ValueError(f"it is {kind}, not an image file")
    with Image.open(path) as image:
        pixels = image.width * image.height
        large = Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS
        if large and pixels > _BOMB_PIXELS_PER_BYTE * status.st_size:
            raise ValueError(
                f"its {image.width} x {image.height} pixels in {status.st_size} bytes look like a "
                "decompression bomb"
            )
        if deep := _deep(image):
            raise ValueError(f"its pixels have more than 8 bits ({deep}); convert it to 8 bits")
        # The scan decodes in several threads; large images take turns, which bounds the memory.
        with _one_large_image if large else nullcontext():
            image.load()
            yield image


def _deep(image: Image.Image) -> str:
    """Says how an image has more than 8 bits a channel; "" if it doesn't.

    Pillow would clip such values to white in images of one channel, and drop their low byte in
    others.
    """
    if image.mode.startswith(("I", "F")):
        return f"Pillow's mode {image.mode}"
    bits = 8
    tiles = getattr(image, "tile", [])  # how Pillow will decode the file
    decoding = tiles[0].args if tiles else None
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))  # type: ignore[attr-defined]
    elif image.format == "PNG" and str(decoding).endswith(";16B"):
        bits = 16
    elif image.format == "PPM" and isinstance(decoding, tuple) and isinstance(decoding[1], int):
        bits = decoding[1].bit_length()  # of the largest value that the file may hold
    return f"{bits} a channel" if bits > 8 else ""


def _as_shown(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """A decoded image in RGB, and notes."""
    with suppress(Exception):  # where EXIF can't be parsed, viewers show the image as stored
        ImageOps.exif_transpose(image, in_place=True)
    colours, alpha = image, None
    if image.has_transparency_data:
        # In mode La the colours are multiplied by alpha.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        colours, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    notes: tuple[str, ...] = ()
    profile = image.info.get("icc_profile")
    try:
        shown = _in_srgb(colours, profile, image.mode) if profile else colours.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        shown, notes = colours.convert("RGB"), (BAD_PROFILE,)
    if alpha is not None:
        shown = Image.composite(shown, Image.new("RGB", shown.size, "white"), alpha)
    return shown, notes


def _in_srgb(colours: Image.Image, profile: bytes, stored_mode: str) -> Image.Image:
    """Converts colours from an ICC profile's colour space to sRGB."""
    mode, transform = _to_srgb(profile)
    if (mode == "L" and stored_mode not in _GREY_MODES) or (mode == "CMYK") != (
        stored_mode == "CMYK"
    ):
        raise ValueError("the profile is for images of another kind")
    if transform is None:
        return colours.convert("RGB")
    return transform.apply(colours.convert(mode))


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that an ICC profile is for, and its transform to sRGB; None for sRGB itself."""
    opened = ImageCms.getOpenProfile(io.BytesIO(profile))
    mode = _MODES_OF_SPACES[opened.profile.xcolor_space.strip()]
    intent = ImageCms.Intent(ImageCms.getDefaultIntent(opened))
    srgb = ImageCms.createProfile("sRGB")
    # LittleCMS' optimised curves for grey are off by up to ten levels where it is dark.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(opened, srgb, mode, "RGB", intent, flags)
    if mode == "CMYK":
        return mode, transform
    sample = _sample_colours().convert(mode)
    before, after = (
        np.asarray(image, dtype=np.int16)
        for image in (sample.convert("RGB"), transform.apply(sample))
    )
    return mode, None if abs(after - before).max() <= _SRGB_TOLERANCE else transform


def _sample_colours() -> Image.Image:
    """All combinations of 16 levels of red, green and blue."""
    levels = range(0, 256, 17)
    colours = bytes(value for r in levels for g in levels for b in levels for value in (r, g, b))
    return Image.frombytes("RGB", (16 * 16, 16), colours)
