"""What tests of the recipe share."""

from collections.abc import Iterator

import narrow_resnet
import pytest


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """Runs in this process train a narrow ResNet-50; the commands of test_recipe.py a whole one."""
    with pytest.MonkeyPatch.context() as patch:
        narrow_resnet.install(patch.setattr)
        yield
