"""``resnet-reg compact``, ``export`` and ``latency``."""

from __future__ import annotations

from collections.abc import Callable

from .command_line import add_corrupt, list_files, parser_of
from .files import RecipeError
from .libraries import import_libraries
from .settings import Number, expanded


def _compact(arguments: list[str]) -> None:
    parser = parser_of("compact")
    parser.add_argument("checkpoint", type=expanded, metavar="CHECKPOINT")
    share = Number(float, 0, 1, above=True, below=True)
    much = parser.add_mutually_exclusive_group()
    much.add_argument(
        "--share",
        type=share,
        help="take out this share of all channels, the least important (default: those that are "
        "exactly zero)",
    )
    much.add_argument(
        "--macs", type=share, help="the same until this share of the multiply-adds is gone"
    )
    parser.add_argument(
        "--method",
        choices=("taylor", "magnitude"),
        default="taylor",
        help="what is important: Taylor expansion of the loss, or the weights' size (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--multiple-of",
        type=Number(int, 1),
        default=8,
        help="keep so many channels that layers have a multiple of this (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        help="images as of `train` whose training part ranks the channels (default: what it was "
        "trained on)",
    )
    add_corrupt(parser)
    parser.add_argument(
        "--out",
        type=expanded,
        metavar="FILE",
        help="the new checkpoint (default: NAME-compact.ckpt beside CHECKPOINT)",
    )
    args = parser.parse_args(arguments)
    if args.data is not None and args.share is None and args.macs is None:
        raise RecipeError("--data ranks channels: give --share or --macs")
    out = args.out or args.checkpoint.with_name(f"{args.checkpoint.stem}-compact.ckpt")
    if not out.parent.is_dir():
        raise RecipeError(f"--out {out}: there is no folder {out.parent}")
    import_libraries()
    from .compaction import compact_checkpoint

    written = compact_checkpoint(
        args.checkpoint,
        out,
        share=args.share,
        macs=args.macs,
        method=args.method,
        multiple_of=args.multiple_of,
        data=args.data,
        corrupt=args.corrupt,
    )
    list_files(written)


def _export(arguments: list[str]) -> None:
    parser = parser_of("export")
    parser.add_argument("checkpoint", type=expanded, metavar="CHECKPOINT")
    parser.add_argument(
        "--onnx", type=expanded, metavar="FILE", help="write ONNX, for any number of images"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare onnxruntime's outputs with torch's"
    )
    parser.add_argument(
        "--weights",
        type=expanded,
        metavar="FILE",
        help="write a .pt or .safetensors file for resnet_reg_ext.load_compact",
    )
    args = parser.parse_args(arguments)
    import_libraries()
    from .onnx_export import export

    list_files(export(args.checkpoint, args.onnx, args.weights, check=args.check))


def _latency(arguments: list[str]) -> None:
    parser = parser_of("latency")
    parser.add_argument("checkpoints", type=expanded, nargs="+", metavar="CHECKPOINT")
    parser.add_argument(
        "--image-size",
        type=Number(int, 8),
        help="height and width in pixels (default: the first checkpoint's)",
    )
    parser.add_argument(
        "--threads", type=Number(int, 1), default=1, help="of each library (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=Number(int, 1), default=20, help="how many (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    import_libraries()
    from .latency import latency

    print(
        latency(
            args.checkpoints, image_size=args.image_size, threads=args.threads, rounds=args.rounds
        )
    )


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "compact": _compact,
    "export": _export,
    "latency": _latency,
}
