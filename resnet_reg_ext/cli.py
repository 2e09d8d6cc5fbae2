"""The command ``resnet-reg``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__
from .backends import native

_RECIPE = {
    "train": "train one ResNet-50",
    "compare": "the same training under none, L2, L1 and elastic net, and a verdict",
    "tune": "the strength of each regulariser, found on the validation images",
    "path": "accuracy, gap and sparsity against the strength of L1",
    "evaluate": "what a checkpoint does: accuracy by class, confusion, features, sparsity",
    "patch": "a fine-tuned checkpoint as a patch of its initial weights, and back",
    "predict": "classes and probabilities of images, as CSV or JSON",
    "compact": "take channels out of a checkpoint: those that are zero, or matter least",
    "export": "write a checkpoint as ONNX, or as plain weights",
    "latency": "how long checkpoints take, beside the dense model",
}


def info() -> str:
    """What is built and usable here, and why something is not."""
    rows = [
        ("resnet_reg_ext", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    if not native.available():
        rows.append(("native module", f"no: {native.missing}"))
        rows.append(("steps run in", "pure PyTorch"))
        return _table(rows)
    core = native._C
    build = core.build_info()
    reads = "C exchange API" if native.has_exchange_api() else "Python (no C exchange API here)"
    levels = core.simd_levels()
    rows += [
        ("native module", f"{build['version']}, {build['compiler']}"),
        ("sanitizers", build["sanitizers"] or "none"),
        ("reads tensors through", f"DLPack, {reads}"),
        ("SIMD level", f"{core.simd_level()} (this CPU can run {', '.join(levels)})"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
        ("OpenMP", core.openmp_runtime()),
    ]
    why = core.why_cpu_unusable()
    on_cpu = f"pure PyTorch: {why}" if why else f"native, {core.simd_level()}"
    rows.append(("steps on a CPU", on_cpu))
    if not build["cuda_toolkit"]:
        rows.append(("CUDA", f"not built: {build['cuda_left_out_because']}"))
        return _table(rows)
    driver = core.cuda_driver_version()
    rows += [
        ("CUDA toolkit", _cuda_version(build["cuda_toolkit"])),
        ("CUDA architectures", build["cuda_architectures"]),
        ("NVIDIA driver", f"supports CUDA {_cuda_version(driver)}" if driver else "none"),
    ]
    for index in range(torch.cuda.device_count() if driver else 0):
        why = native.why_cuda_unusable(index)
        rows.append((f"steps on cuda:{index}", f"pure PyTorch: {why}" if why else "native"))
    return _table(rows)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _recipe(command: str, arguments: Sequence[str]) -> int:
    """Runs a command of the recipe, whose libraries take seconds to import."""
    # Of the others, standard output may be a table for another program.
    is_long = command in ("train", "compare", "tune", "path", "evaluate")
    if is_long and "-h" not in arguments and "--help" not in arguments:
        say_that_imports_take_a_while(command)
    try:
        from .recipe import commands
    except KeyboardInterrupt:
        print(f"resnet-reg {command}: interrupted", file=sys.stderr)
        return 130
    return commands.main(command, arguments)


def say_that_imports_take_a_while(command: str) -> None:
    """So that something is seen at once, before the first figure comes."""
    is_there = importlib.util.find_spec("lightning") is not None
    if is_there and f"{__package__}.recipe.train" not in sys.modules:
        with contextlib.suppress(OSError):
            print(f"resnet-reg {command}: loading PyTorch and Lightning", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="resnet-reg",
        description="Regularised, sparse ResNet-50s: what is installed, and a training recipe. "
        "`resnet-reg COMMAND --help` tells more of a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built and usable here, and why something is not")
    for name, text in _RECIPE.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command in _RECIPE:
        return _recipe(chosen.command, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
