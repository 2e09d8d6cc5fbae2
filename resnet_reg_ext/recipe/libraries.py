"""The libraries of the extra ``train``, imported once a command's options are parsed."""

from __future__ import annotations

from .files import RecipeError


def import_libraries() -> None:
    """Imports what takes seconds.

    Raises:
        RecipeError: the extra `train` is not installed, or is for another torch.
    """
    try:
        from . import compare, evaluate  # noqa: F401
    # A torchvision built for another torch raises a RuntimeError or OSError.
    except (ImportError, OSError, RuntimeError) as error:
        raise RecipeError(
            f"it needs the extra 'train': pip install '.[train]' in the sources' folder ({error})"
        ) from None
