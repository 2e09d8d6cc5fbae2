"""Bugs planted in the CPU core and its reader must each be caught by a test of the core alone.

A mutant is a copy of csrc/ with one small edit, built into a package that holds the core alone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import caching_compiler
import pytest

from resnet_reg_ext import _C
from resnet_reg_ext.backends import openmp

ROOT = Path(__file__).resolve().parents[2]
TESTS = [Path(__file__).with_name(f"test_native_{name}.py") for name in ("lists", "rows")]

pytestmark = [
    pytest.mark.one_torch,
    pytest.mark.skipif(_C.simd_level() != "avx2", reason="the bugs are AVX2's"),
]
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    caught_by: str


LISTS, VIEW, LAUNCH = "tensor_lists.cpp", "tensor_view.cpp", "cpu/launch.cpp"
THREADS, ROWS, ROW_LAUNCH = "cpu/threads.h", "cpu/rows.cpp", "cpu/row_launch.cpp"
MUTANTS = [
    Mutant(
        "counters begin anew", LISTS, "num_zeros + i;", "num_zeros + i % 128;", "count_of_zeros"
    ),
    Mutant(
        "misfits begin anew", LISTS, "push_back({i, reason", "push_back({i % 128, reason", "odd"
    ),
    Mutant(
        "device index not compared",
        VIEW,
        "tensor.device.device_id == other.tensor.device.device_id;",
        "true;",
        "one_device",
    ),
    Mutant("sizes in 32 bits", VIEW, "int64_t n = 1;", "int32_t n = 1;", "cut_to_32_bits"),
    Mutant(
        "layout before memory",
        LISTS,
        "if (!has_memory)",
        "if (!has_memory && same_layout)",
        "no_other",
    ),
    Mutant(
        "layout before the device",
        LISTS,
        "if (unusable != Reason::fits)",
        "if (unusable != Reason::fits && same_layout)",
        "unusable_cuda_device",
    ),
    Mutant(
        "number of threads dropped",
        LAUNCH,
        "threads = worthwhile_threads(threads, plan.chunks(), elements);",
        "threads = 1;",
        "threads_that_it_may",
    ),
    Mutant("threads keep the caller's mode", THREADS, "      own.apply();\n", "", "their_own_mode"),
    Mutant("callers' mode ignored", THREADS, "      callers.apply();\n", "", "their_own_mode"),
    Mutant(
        "float16 by the current rounding mode",
        "cpu/avx2.h",
        "_MM_FROUND_TO_NEAREST_INT",
        "_MM_FROUND_CUR_DIRECTION",
        "rounding_mode",
    ),
    Mutant(
        "starts of any dtype",
        LISTS,
        "dtypes[kStart] != dtypes[weight]",
        "false",
        "odd_start",
    ),
    Mutant(
        "starts ignored",
        LAUNCH,
        "operands.front().start != nullptr",
        "false",
        "return_exactly",
    ),
    Mutant(
        "vectors short of their start by a rounding",
        "cpu/avx2.h",
        "return keep(equal(a, b), mask);",
        "return keep(equal(a, b), mask & 0x3fffffffu);",
        "return_exactly",
    ),
    Mutant(
        "zeros counted where there are starts",
        "cpu/elements.cpp",
        "  if constexpr (V::kCounts && V::kTowardsStart) {\n    typename T::Param",
        "  if constexpr (false) {\n    typename T::Param",
        "return_exactly",
    ),
    Mutant(
        "GIL held", "bindings.cpp", "  const py::gil_scoped_release release;\n", "", "during_a_step"
    ),
    Mutant(
        "threads converted by Python code",
        "bindings.cpp",
        "const py::int_& threads)",
        "const py::object& threads)",
        "no_python_runs",
    ),
    Mutant(
        "lanes added in pairs",
        ROWS,
        "(of[0] + of[2]) + (of[1] + of[3])",
        "(of[0] + of[1]) + (of[2] + of[3])",
        "bits_of_the_reference",
    ),
    Mutant("segments of 256", ROWS, "kSegment = 512", "kSegment = 256", "bits_of_the_reference"),
    Mutant(
        "ridge multiplied into the factor",
        ROWS,
        "prox_sgd::mul_(prox_sgd::mul_(w[i], factor), r)",
        "prox_sgd::mul_(w[i], prox_sgd::mul_(factor, r))",
        "bits_of_the_reference",
    ),
    Mutant(
        "zero groups not counted", ROWS, "if (counts) {", "if (counts && factor != C(0)) {", "zeros"
    ),
    Mutant(
        "zeros by a product",
        ROWS,
        "if (!kStart && factor == C(0)) {",
        "if (false) {",
        "at_its_threshold",
    ),
    Mutant(
        "a NaN becomes zero",
        "math/row_factor.h",
        "norm <= t ? 0.0 : sub_(1.0, div_(t, norm))",
        "norm > t ? sub_(1.0, div_(t, norm)) : 0.0",
        "nan",
    ),
    Mutant(
        "a threshold of 0 clears -0",
        "math/row_factor.h",
        "t == 0.0 ? 1.0 : factor",
        "factor",
        "threshold_of_0",
    ),
    Mutant(
        "the first piece's weights",
        ROW_LAUNCH,
        "set.weights[piece.begin + row]",
        "set.weights[row]",
        "bits_of_the_reference",
    ),
    Mutant(
        "ridge in the update too",
        ROW_LAUNCH,
        "if (options.proximal) without_ridge.weight_decay = 0.0;",
        "",
        "bits_of_the_reference",
    ),
    Mutant(
        "the first group's options",
        ROW_LAUNCH,
        "options[member.options]",
        "options[0]",
        "bits_of_the_reference",
    ),
    Mutant(
        "norm of the weights where there are starts",
        ROWS,
        "distance = sub_(p, start);",
        "distance = p;",
        "its_start",
    ),
    Mutant(
        "factor on the weight itself",
        "math/row_factor.h",
        "mul_(factor, sub_(p, start))",
        "mul_(factor, p)",
        "bits_of_the_reference",
    ),
    Mutant(
        "a start that a product with 0 misses",
        "math/row_factor.h",
        "return factor == C(0) ? start : moved;",
        "return moved;",
        "its_start",
    ),
    Mutant(
        "the first piece's start",
        ROW_LAUNCH,
        "(o.start) + first * kernels.start_size",
        "(o.start)",
        "bits_of_the_reference",
    ),
    Mutant(
        "zeros counted where rows have starts",
        ROWS,
        "is_at_start<P>(p[i], start[i])",
        "is_zero(p[i])",
        "its_start",
    ),
    Mutant(
        "the first member's start or none for all",
        ROW_LAUNCH,
        "member.operands.start != nullptr",
        "set.members.front().operands.start != nullptr",
        "bits_of_the_reference",
    ),
    Mutant(
        "storages not compared",
        "row_bindings.cpp",
        "batch.storage != set.storage || ",
        "",
        "unlike",
    ),
    Mutant(
        "a batch's order for the list's",
        LISTS,
        "batch.indices.push_back(f.index);",
        "batch.indices.push_back(static_cast<int64_t>(batch.indices.size()));",
        "place_in_the_list",
    ),
]


class Core:
    """A copy of csrc/ and the package that is built of it."""

    def __init__(self, folder: Path) -> None:
        self.csrc = folder / "csrc"
        self.package = folder / "site" / "resnet_reg_ext"
        self.package.mkdir(parents=True)
        library = openmp.load()  # as the package does: the core isn't linked to a libgomp
        load = f"import ctypes\nctypes.CDLL({library!r}, mode=ctypes.RTLD_GLOBAL)\n"
        (self.package / "__init__.py").write_text(load if library else "")
        shutil.copytree(ROOT / "csrc", self.csrc, ignore=shutil.ignore_patterns("__pycache__"))
        spec = importlib.util.spec_from_file_location(
            "mutated_build", self.csrc / "build.py", submodule_search_locations=[str(self.csrc)]
        )
        assert spec is not None
        assert spec.loader is not None
        self.builder = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self.builder
        spec.loader.exec_module(self.builder)
        self.out = folder / "out"
        self.built = folder / "built"  # of the sources as they are

    def restore(self, file: str, source: str, times: tuple[int, int]) -> None:
        """Puts back a source and what was compiled, with their times: ninja has nothing to do."""
        (self.csrc / file).write_text(source)
        os.utime(self.csrc / file, ns=times)
        shutil.rmtree(self.out)
        shutil.copytree(self.built, self.out)

    def build(self) -> None:
        module = self.out / Path(_C.__file__).name
        self.builder.build(self.out, module, _C.build_info()["version"], False)
        shutil.copy(module, self.package)

    def failures(self, chosen: str = "") -> str:
        """What pytest prints of the chosen tests that fail."""
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
        if chosen:  # one failure tells
            command.append("-x")
        path = os.pathsep.join([str(self.package.parent), str(ROOT / "tests")])
        result = subprocess.run(
            [*command, "-c", os.devnull, *TESTS, "-k", chosen],
            cwd=self.package,
            env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **NO_PLUGINS},
            capture_output=True,
            text=True,
        )
        assert result.returncode in (0, 1), result.stdout + result.stderr
        return result.stdout if result.returncode else ""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_REG_EXT_CUDA", "0")
        compiler = caching_compiler.wrapper(tmp_path_factory.mktemp("compiler") / "c++")
        patch.setenv("CXX", str(compiler))
        made = Core(tmp_path_factory.mktemp("core"))
        made.build()
        shutil.copytree(made.out, made.built)
        yield made


def test_the_sources_as_they_are_pass(core: Core) -> None:
    assert core.failures() == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_planted_bug_is_caught(mutant: Mutant, core: Core) -> None:
    path = core.csrc / mutant.file
    source = path.read_text()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    assert source.count(mutant.old) == 1, "the edit no longer applies"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        core.build()
        assert mutant.caught_by in core.failures(mutant.caught_by)
    finally:
        core.restore(mutant.file, source, times)
