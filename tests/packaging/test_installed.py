"""What is tested is the installed package with its native module, which needs no torch library."""

import ctypes
import importlib.metadata
import json
import pathlib
import struct
import subprocess
import sys
import sysconfig
import warnings

import pytest
import torch

import resnet_reg_ext
from resnet_reg_ext.backends import native, openmp

HERE = pathlib.Path(__file__).resolve()
NATIVE = pathlib.Path(native._C.__file__).resolve()


def needed_libraries(path):
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQQ", data, table + i * entry_size) for i in range(count)]

    def offset_of(address):
        for kind, _, offset, start, _, size, _ in segments:
            if kind == 1 and start <= address < start + size:  # PT_LOAD
                return offset + address - start
        raise ValueError(f"address {address} is in no segment")

    (dynamic,) = (s for s in segments if s[0] == 2)  # PT_DYNAMIC
    entries = list(struct.iter_unpack("<QQ", data[dynamic[2] : dynamic[2] + dynamic[5]]))
    (strings,) = (offset_of(value) for tag, value in entries if tag == 5)  # DT_STRTAB

    def text(at):
        return data[strings + at : data.index(b"\0", strings + at)].decode()

    return [text(value) for tag, value in entries if tag == 1]


def test_the_package_is_the_installed_one():
    package = pathlib.Path(resnet_reg_ext.__file__).resolve().parent
    places = {pathlib.Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")}
    assert package.parent in places
    assert package != HERE.parents[2] / "resnet_reg_ext"
    assert NATIVE.parent == package


def test_every_module_is_the_installed_one():
    package = pathlib.Path(resnet_reg_ext.__file__).resolve().parent
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "resnet_reg_ext" and getattr(module, "__file__", None):
            assert package in pathlib.Path(module.__file__).resolve().parents, name


def test_versions_agree():
    version = importlib.metadata.version("resnet_reg_ext")
    assert resnet_reg_ext.__version__ == version
    assert native._C.build_info()["version"] == version


def test_what_is_installed_holds_no_litter():
    files = importlib.metadata.files("resnet_reg_ext")
    kinds = {f.suffix for f in files if f.parts[0] == "resnet_reg_ext"} - {".pyc"}
    assert kinds == {".py", ".so", ".typed", ".jinja"}
    natives = [f for f in files if f.suffix == ".so"]
    assert len(natives) == 1
    tops = {f.parts[0] for f in files} - {".."}  # the console script lies outside
    assert {t for t in tops if not t.endswith(".dist-info")} == {"resnet_reg_ext"}


def test_torch_is_a_run_time_dependency_with_a_lower_bound_only():
    requires = importlib.metadata.requires("resnet_reg_ext")
    (requirement,) = (r for r in requires if r.startswith("torch") and "extra" not in r)
    assert requirement.startswith("torch>=")
    assert "," not in requirement


def test_the_native_module_links_neither_torch_nor_cuda():
    libraries = needed_libraries(NATIVE)
    assert any(name.startswith("libc.so") for name in libraries)  # the parser does find them
    for name in libraries:
        assert not name.startswith(("libtorch", "libc10", "libcuda", "libcudart", "libnv")), name


def test_the_parser_finds_torchs_own_libraries():
    """On a file that does link torch."""
    torch_module = next(pathlib.Path(torch.__file__).parent.glob("_C.*.so"))
    library = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    assert any(
        name.startswith("libtorch")
        for path in (torch_module, library)
        for name in needed_libraries(path)
    )


def test_the_native_module_loads_without_torch(tmp_path):
    code = f"""
import ctypes, importlib.util, sys
ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("resnet_reg_ext._C", {str(NATIVE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.build_info()["version"], module.simd_level())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    version, level = result.stdout.split()
    assert version == resnet_reg_ext.__version__
    assert level in native._C.simd_levels()


def test_public_names():
    assert sorted(resnet_reg_ext.__all__) == [
        "L1Scheduler",
        "LayerSparsity",
        "ProxSGD",
        "Sparsity",
        "TargetSparsity",
        "apply_patch",
        "channels",
        "compact",
        "functional",
        "importance",
        "load_compact",
        "param_groups",
        "remove",
        "save_compact",
        "save_patch",
        "sparsity",
        "zero_dead_columns",
    ]
    assert sorted(resnet_reg_ext.functional.__all__) == [
        "elastic_net_prox",
        "group_soft_threshold",
        "prox_sgd_",
        "soft_threshold",
    ]
    for module in (resnet_reg_ext, resnet_reg_ext.functional):
        for name in module.__all__:
            assert getattr(module, name).__doc__


def test_a_device_that_cannot_be_used_is_warned_of_once_with_the_reason(monkeypatch):
    """Asked of a device that there is on no machine, so of one with a GPU too."""
    monkeypatch.setattr(native, "_warned", set())
    device = torch.device("cuda:99")
    why = native.why_cuda_unusable(device.index)
    assert why
    with pytest.warns(UserWarning, match="ProxSGD runs in pure PyTorch on cuda:99") as caught:
        native.warn_unusable_cuda(device)
    assert why in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.warn_unusable_cuda(device)


# Steps in two threads, then prints the libgomps that are mapped and the one that the step uses.
STEP = """
import json, torch, resnet_reg_ext
from resnet_reg_ext.backends import native
torch.set_num_threads(2)
w = torch.nn.Parameter(torch.ones(1_000_000))
w.grad = torch.zeros_like(w)
resnet_reg_ext.ProxSGD([w], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.25, fused=True).step()
assert (w == 0.75).all()
torch.rand(1_000_000).exp_()
lines = open("/proc/self/maps").read().splitlines()
mapped = sorted({line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line})
print(json.dumps([mapped, native._C.openmp_runtime()]))
"""


def brought_by_torch():
    package = pathlib.Path(torch.__file__).resolve().parent
    found = [*package.glob("lib/libgomp*"), *package.parent.glob("torch.libs/libgomp*")]
    return [path.resolve() for path in found]


def test_the_native_module_needs_no_libgomp_of_its_own():
    assert not [name for name in needed_libraries(NATIVE) if "omp" in name]


def test_a_step_uses_torchs_libgomp_and_there_is_no_other():
    result = subprocess.run([sys.executable, "-P", "-c", STEP], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    mapped, used = json.loads(result.stdout)
    assert [pathlib.Path(path).resolve() for path in mapped] == [pathlib.Path(used).resolve()]
    if brought_by_torch():
        assert pathlib.Path(used).resolve() in brought_by_torch()


def test_without_a_copy_of_torchs_the_systems_is_taken(monkeypatch, tmp_path):
    """As with a torch that a distribution has built."""
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        assert openmp.load() == ""
    else:
        assert openmp.load() == "libgomp.so.1"
