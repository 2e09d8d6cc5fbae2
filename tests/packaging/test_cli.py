"""The command ``resnet-reg``."""

import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import pytest
import torch
from bare import BARE

import resnet_reg_ext
from resnet_reg_ext import cli
from resnet_reg_ext.backends import native

SCRIPT = pathlib.Path(sysconfig.get_path("scripts")) / "resnet-reg"


def rows(text):
    """The lines of two columns as a dict."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.strip().splitlines())


def test_info_says_what_is_here(capsys):
    assert cli.main(["info"]) == 0
    said = rows(capsys.readouterr().out)
    build = native._C.build_info()
    assert said["resnet_reg_ext"] == resnet_reg_ext.__version__
    assert said["torch"] == torch.__version__
    assert said["Python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert build["version"] in said["native module"]
    assert said["SIMD level"].startswith(native._C.simd_level())
    assert said["threads"].startswith(str(torch.get_num_threads()))
    if build["cuda_toolkit"]:
        assert said["CUDA architectures"] == build["cuda_architectures"]
    else:
        assert said["CUDA"].startswith("not built: ")
        assert len(said["CUDA"]) > len("not built: ")
    assert ("NVIDIA driver" in said) is bool(build["cuda_toolkit"])
    assert said["steps on a CPU"] == f"native, {native._C.simd_level()}"


@pytest.mark.usefixtures("runtime")
def test_info_tells_the_level_and_reader_in_use(capsys):
    native._C.set_simd_level("none")
    native.use_exchange_api(False)
    cli.main(["info"])
    said = rows(capsys.readouterr().out)
    assert said["SIMD level"].startswith("none")
    assert said["steps on a CPU"] == f"pure PyTorch: {native._C.why_cpu_unusable()}"
    assert "Python" in said["reads tensors through"]


def test_the_installed_script_runs(tmp_path):
    environment = {**os.environ, "RESNET_REG_EXT_SIMD": "none"}
    result = subprocess.run(
        [SCRIPT, "info"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    said = rows(result.stdout)
    assert said["resnet_reg_ext"] == resnet_reg_ext.__version__
    assert said["SIMD level"].startswith("none")


WITHOUT_EXTRAS = f"""{BARE}
import contextlib, io, json
from resnet_reg_ext import cli
said = {{}}
for command in ["info", *cli._RECIPE]:
    given = {{
        "evaluate": ["x.ckpt"],
        "predict": ["x.ckpt", "x.png"],
        "patch": ["save", "x.ckpt", "--start", "y.pt", "--out", "z.safetensors"],
        **dict.fromkeys(("compact", "export", "latency"), ["x.ckpt"]),
    }}.get(command, [])
    for arguments in ([command, "--help"], [command, *given]):
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                code = cli.main(arguments)
            except SystemExit as stopped:
                code = stopped.code
        said[" ".join(arguments[:2])] = code, out.getvalue(), error.getvalue()
print(json.dumps(said))
"""


def test_help_and_errors_without_the_extras(tmp_path):
    """After `pip install .`, which brings torch alone: no warning, no traceback."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said.pop("info")[0::2] == [0, ""]
    for command in ["info", *cli._RECIPE]:
        code, out, error = said.pop(f"{command} --help")
        assert (code, error) == (0, "")
        assert f"usage: resnet-reg {command}" in out
        assert command in ("info", "export", "latency", "patch") or "--out" in out
    assert len(said) == len(cli._RECIPE)
    for arguments, (code, out, error) in said.items():
        command = arguments.split()[0]
        assert (code, out) == (2, "")
        assert error.startswith(f"resnet-reg {command}: it needs the extra 'train': pip install")
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == resnet_reg_ext.__version__


@pytest.mark.parametrize("arguments", [[], ["fly"]], ids=["none", "unknown"])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: resnet-reg" in capsys.readouterr().err
