"""Files of versions that had two sets: what they called test chose the checkpoint.

It is the validation set today; there was no test set in today's sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIGITS_HELD_OUT = 500  # as many digits were held out where nothing else was asked for
# A file of such a version has all of the first and none of the second.
_HAD = {"data", "train_size", "test_size", "corrupt", "evaluate_every"}
_HAD_NOT = {"val_size", "test_fraction", "group_by"}


def is_former(settings: Mapping[Any, Any]) -> bool:
    """Whether a run's settings were written by such a version."""
    return set(settings) >= _HAD and not _HAD_NOT & set(settings)


def upgraded_settings(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """Settings as they are called today, of a run or of a command; newer ones stay."""
    settings = dict(settings)
    if not is_former(settings):
        return settings
    settings["val_size"], settings["test_size"] = settings["test_size"], None
    settings["group_by"] = "none"
    if settings["data"] == "digits":
        settings["val_size"] = settings["val_size"] or DIGITS_HELD_OUT
        settings["test_size"] = 0
    if "cold" in settings:  # `path` started warm unless it was told otherwise
        settings["warm"] = not settings.pop("cold")
    return settings


def upgraded_result(content: Mapping[str, Any]) -> dict[str, Any]:
    """A former version's ``result.json`` with today's names; a newer one stays."""
    content = dict(content)
    run, data = content.get("run"), content.get("data")
    if not isinstance(run, Mapping) or not is_former(run) or not isinstance(data, Mapping):
        return content
    content["run"] = upgraded_settings(run)
    content["data"] = {
        "validation_images" if name == "test_images" else name: value
        for name, value in data.items()
    } | {"test_images": 0}
    if isinstance(content.get("history"), list):
        content["history"] = [_row(row) for row in content["history"]]
    return {**content, "test": None, "best": None, "validation_error": None}


def _row(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    return {
        name.replace("test_", "validation_") if isinstance(name, str) else name: value
        for name, value in row.items()
    }
