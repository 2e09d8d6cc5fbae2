"""Finding and running nvcc."""

from __future__ import annotations

import pytest

import ptx
from ptx.compiler import CompilerError, find_tool

SOURCE = """#include "factor.h"
extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "factor.h").write_text("#define FACTOR 2.0f\n")
    path = tmp_path / "with space.cu"
    path.write_text(SOURCE)
    return path


def test_a_change_in_an_included_file_compiles_again(source):
    arguments = (source, "compute_90", ("-O3",), (source.parent / "include",))
    first = ptx.compile_ptx(*arguments)
    assert ptx.list_kernels(ptx.parse(first)) == ["scale"]
    assert ptx.compile_ptx(*arguments) == first
    (source.parent / "include" / "factor.h").write_text("#define FACTOR 3.0f\n")
    assert "0f40400000" in ptx.compile_ptx(*arguments)


def test_machine_code_comes_with_what_ptxas_says(source):
    path, report = ptx.compile_cubin(source, "sm_90", (), (source.parent / "include",))
    assert path.read_bytes().startswith(b"\x7fELF")
    assert "Used" in report
    assert "registers" in report


def test_errors_of_the_compiler_are_passed_on(source):
    with pytest.raises(CompilerError, match=r"factor\.h"):
        ptx.compile_ptx(source, "compute_90")


def test_architectures_are_in_order():
    numbers = [int(name.removeprefix("compute_")) for name in ptx.architectures()]
    assert numbers == sorted(numbers)
    assert ptx.newest_arch() == f"compute_{numbers[-1]}"
    assert {75, 80, 90, 100, 120} <= set(numbers)


def test_tools():
    assert ptx.find_nvcc().name == "nvcc"
    assert find_tool("ptxas").exists()
    with pytest.raises(CompilerError, match="no-such-tool"):
        find_tool("no-such-tool")
