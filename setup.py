"""Builds resnet_reg_ext._C with ninja: C++ always, CUDA if there is a compiler for it.

Environment variables:
    RESNET_REG_EXT_NATIVE=0    leave the native module out: a pure-PyTorch package
    RESNET_REG_EXT_CUDA=1|0    insist on CUDA, or leave it out; found out if unset
    RESNET_REG_EXT_SANITIZE    sanitizers to build with, such as "address,undefined"
    TORCH_CUDA_ARCH_LIST       CUDA architectures, such as "8.0;9.0+PTX"
    CXX                        the C++ compiler

The compilers are csrc/build.py's business; metadata is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def _load(path: Path) -> Any:
    """A module by its path, which its neighbours are submodules of.

    Not by its name: other packages install a csrc, or a build, of their own.
    """
    spec = importlib.util.spec_from_file_location(
        "resnet_reg_ext_build", path, submodule_search_locations=[str(path.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


native = _load(CSRC / "build.py")


def native_wanted() -> bool:
    """Whether to build the native module: on Linux, unless told not to."""
    wanted = native.setting("RESNET_REG_EXT_NATIVE")
    if wanted == "0":
        return False
    if sys.platform != "linux":
        if wanted == "1":
            raise SystemExit("RESNET_REG_EXT_NATIVE=1: the native module is built on Linux only")
        print("resnet_reg_ext: the native module is for Linux; installing pure PyTorch")
        return False
    return True


class FreshBuild(build_py):  # type: ignore[misc]
    """Copies the package into an empty folder: an older version may have left files there."""

    def run(self) -> None:
        """Empties the folder, and copies."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "resnet_reg_ext"), ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):  # type: ignore[misc]
    """Compiles csrc/ in parallel, rebuilding only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the module and puts it in its place."""
        folder = Path(self.build_temp).resolve() / ext.name
        target = Path(self.get_ext_fullpath(ext.name))
        output = folder / target.name
        verbose = bool(self.verbose or os.environ.get("VERBOSE"))
        native.build(folder, output, self.distribution.get_version(), verbose)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output, target)
        target.chmod(0o755)

    def get_source_files(self) -> list[str]:
        """All of csrc/, for the source distribution."""
        return [str(p.relative_to(ROOT)) for p in sorted(CSRC.rglob("*")) if p.is_file()]


if native_wanted():
    setup(
        ext_modules=[Extension("resnet_reg_ext._C", sources=[])],
        cmdclass={"build_ext": NinjaBuild, "build_py": FreshBuild},
        setup_requires=native.requirements(),
    )
else:
    setup(cmdclass={"build_py": FreshBuild})
