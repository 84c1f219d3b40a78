"""A CUDA error that ends a process ends one test: conftest.py registers these hooks.

After such an error every CUDA call of the process fails. A worker of `pytest -n` then exits, once the test's reports are
sent, and xdist starts another for the tests that are left. With --dist load or worksteal none is lost and none runs twice
(loadfile and loadgroup run the test again); the test is reported twice, also as the one that its worker crashed in.
Without -n the GPU tests that are left fail at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest

DIED = pytest.StashKey[str]()


def error() -> str | None:
    """Of the device, or None. It is asked twice: an error that does not end the process is told once."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    found = None
    for _ in range(2):
        try:
            torch.cuda.synchronize()
        except RuntimeError as caught:
            found = f"{type(caught).__name__}: {str(caught).partition(chr(10))[0]}"
        else:
            return None
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and (died := item.config.stash.get(DIED, None)):
        pytest.fail(f"not run: {died}", pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """An error of the test's last kernels is its own, not that of the next test that waits for the device."""
    if "gpu" in item.keywords and DIED not in item.config.stash and (found := error()):
        item.config.stash[DIED] = f"{item.nodeid} left the CUDA device unusable ({found})"
        pytest.fail(item.config.stash[DIED], pytrace=False)


@pytest.hookimpl(wrapper=True, trylast=True)  # inside of what limits a test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if DIED in item.config.stash and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # not sys.exit: what would be torn down lies on the device
    return result
