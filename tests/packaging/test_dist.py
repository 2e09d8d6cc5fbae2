"""What `make dist` relies on; the whole of it takes minutes and stays there."""

from __future__ import annotations

import subprocess
import sys

import make_dist
import pytest

pytestmark = pytest.mark.one_torch


def test_the_pythons_found_are_those_that_are_supported() -> None:
    found = make_dist.pythons()
    assert sys.version_info[:2] in found
    for version, program in found.items():
        script = "import sys; print(*sys.version_info[:2])"
        said = subprocess.run([program, "-c", script], capture_output=True, text=True, check=True)
        assert tuple(map(int, said.stdout.split())) == version >= make_dist.OLDEST


def test_the_smoke_test_passes_here_and_fails_without_the_cuda_kernels() -> None:
    """On the installed package, which has them or not."""
    from resnet_reg_ext.backends import native

    has_cuda = bool(native._C.build_info()["cuda_architectures"])

    def smoke(with_cuda: bool) -> subprocess.CompletedProcess[str]:
        script = make_dist.SMOKE.replace("WITH_CUDA", str(with_cuda))
        return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)

    passed = smoke(has_cuda)
    assert passed.returncode == 0, passed.stderr
    assert "fused step with" in passed.stdout
    assert has_cuda or smoke(True).returncode != 0
