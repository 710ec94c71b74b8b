"""How the tests run with and without a CUDA device, and without hypothesis.

Without a device, kernels run in Triton's interpreter; that is set here, before anything imports triton. With one, each
test ends by waiting for the device, so that a fault shows up at the test that caused it, and failing examples are not
shrunk, because every try would be compiled. Without hypothesis, property tests are skipped and all others run.
"""

import importlib.util
import os
import sys

import pytest
import torch

HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None

if not HYPOTHESIS:
    from . import without_hypothesis

    without_hypothesis.install()

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
elif HYPOTHESIS:
    from hypothesis import Phase, settings

    settings.register_profile("gpu", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("gpu")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After an illegal access nothing works in this process: say so, and let pytest-xdist start another process."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{item.nodeid}: the device is lost: {error}", file=sys.stderr, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
