"""One image file: whether it can be used, and its pixels as RGB."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import pil_loader


def load_image(path: Path) -> Image.Image:
    """The pixels as a PIL image of mode RGB."""
    image: Image.Image = pil_loader(str(path))
    return image


def find_fault(path: Path) -> str:
    """The reason why an image can't be used; "" if it can."""
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
    except Exception as error:  # Pillow's decoders raise many kinds
        return " ".join(str(error).split()) or type(error).__name__
    if mode.startswith(("I", "F")):  # 16 and 32 bits: Pillow's conversion would clip them to white
        return f"its pixels have more than 8 bits (Pillow's mode {mode}); convert it to 8 bits"
    return ""
