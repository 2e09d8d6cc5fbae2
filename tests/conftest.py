"""What holds for the whole run.

``RESNET_REG_EXT_TEST_NO_EXCHANGE_API=1`` hides DLPack's C exchange API from the native core, so
that the way for an older torch is taken throughout.
"""

import gc
import os

import hypothesis
import instructions
import pytest
import torch

from resnet_reg_ext.backends import native

# The same examples at every run: a failure is then a change's, not chance's.
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("suite")

NO_EXCHANGE_API = "RESNET_REG_EXT_TEST_NO_EXCHANGE_API"


def pytest_configure(config):
    if os.environ.get(NO_EXCHANGE_API) == "1":
        native.use_exchange_api(False)


def pytest_report_header(config):
    if not native.available():
        return f"native module: none ({native.missing})"
    why_not = instructions.why_not()
    return [
        f"torch {torch.__version__}, native module with SIMD level {native._C.simd_level()}, "
        f"exchange API: {native.has_exchange_api()}",
        f"instruction counts: {f'not compared, {why_not}' if why_not else 'compared'}",
    ]


def pytest_collection_finish():
    """What is imported by now stays: garbage is looked for in the rest, and so in less time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def runtime():
    """Puts thread count, SIMD level and the way of reading tensors back after a test."""
    threads, level = torch.get_num_threads(), native._C.simd_level()
    exchange_api = native.has_exchange_api()
    yield
    torch.set_num_threads(threads)
    native._C.set_simd_level(level)
    native.use_exchange_api(exchange_api)


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch in a whole file, where small steps would wait for the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter):
    """How many of the bugs planted in the CUDA kernels and their plan were caught."""
    reports = {
        outcome: [
            report
            for report in terminalreporter.stats.get(outcome, [])
            if "test_a_planted_bug_is_caught" in report.nodeid
        ]
        for outcome in ("passed", "failed")
    }
    planted = sum(map(len, reports.values()))
    if planted:
        terminalreporter.write_line(f"planted bugs caught: {len(reports['passed'])} of {planted}")
