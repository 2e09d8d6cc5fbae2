"""On a real GPU: what the PTX interpreter can't show. Skipped, visibly, where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from resnet_reg_ext import ProxSGD, _native
from resnet_reg_ext.functional import prox_sgd_

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver"
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [
    {"lr": 0.1, "l1": 0.3, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "l1": 0.03, "weight_decay": 0.1, "nesterov": True},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "l1": 0.06, "maximize": True},
    {"lr": 0.1, "momentum": 0.7, "l1": 0.1, "weight_decay": 0.5, "l2_mode": "proximal"},
]


def bucket(dtype: torch.dtype, device: str = "cpu") -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 3, 4, 5, 1023, 4096, 4097, 100_003]
    return [
        [torch.randn(n, generator=generator).to(dtype).to(device) for n in sizes] for _ in range(3)
    ]


def test_the_build_can_use_this_gpu():
    assert _native.why_cuda_unusable(torch.cuda.current_device()) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_equal_the_cpu_backends(dtype, options):
    on_cpu, on_gpu = bucket(dtype), bucket(dtype, "cuda")
    for p, g, m in (on_cpu, on_gpu):
        for step in range(3):
            prox_sgd_(
                p,
                g,
                m if "momentum" in options else None,
                first_step=not step,
                fused=True,
                **options,
            )
    for cpu, gpu in zip(on_cpu[0] + on_cpu[2], on_gpu[0] + on_gpu[2], strict=True):
        assert torch.equal(cpu, gpu.cpu())


def test_the_step_waits_for_its_own_stream_only():
    p, g = torch.zeros(1 << 22, device="cuda"), torch.zeros(1 << 22, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the gradient arrives late, on the step's stream
        g.fill_(1.0)
        prox_sgd_([p], [g], lr=1.0, fused=True)
    torch.cuda.current_stream().wait_stream(side)
    assert (p == -1.0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_step_runs_where_the_tensors_are():
    p, g = torch.zeros(10, device="cuda:1"), torch.ones(10, device="cuda:1")
    with torch.cuda.device(0):
        prox_sgd_([p], [g], lr=1.0, fused=True)
        assert torch.cuda.current_device() == 0
    assert (p == -1.0).all()


def test_buffers_made_anew_for_each_step_are_safe():
    """Gradients that are freed while the kernel may still run are reused in stream order."""
    w = torch.nn.Parameter(torch.zeros(1 << 20, device="cuda"))
    optimizer = ProxSGD([w], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.0, fused=True)
    for _ in range(50):
        w.grad = torch.ones_like(w)
        optimizer.step()
        optimizer.zero_grad()
        torch.full_like(w, 1e9)
    assert (w == -50.0).all()


def test_a_captured_graph_replays_the_step():
    w = torch.nn.Parameter(torch.zeros(1000, device="cuda"))
    w.grad = torch.ones_like(w)
    optimizer = ProxSGD([w], lr=1.0, momentum=0.5, weight_decay=0.0, l1=0.0, fused=True)
    optimizer.step()  # makes the momentum buffers
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert (w == -1.0).all()  # capturing runs nothing
    graph.replay()
    torch.cuda.synchronize()
    assert (w == -2.5).all()


def test_compute_sanitizer_finds_nothing():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (
        "import torch; from resnet_reg_ext.functional import prox_sgd_\n"
        "p, g, m = ([torch.randn(n, device='cuda') for n in (1, 5, 4099)] for _ in range(3))\n"
        "prox_sgd_(p, g, m, lr=.1, momentum=.9, l1=.1, fused=True); torch.cuda.synchronize()\n"
    )
    command = [tool, "--error-exitcode", "9", sys.executable, "-P", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
