"""What a CUDA error that ends a process does to a run of the GPU tests; the device is a fake."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FAKE = """
import pytest
import torch

dead = False


def synchronize():
    if dead:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")


torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize


def run(number):
    global dead
    if number == BAD:
        dead = True
        HOW
    synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(9))
def test_it(number):
    run(number)


def test_another():
    pass
"""


def outcomes(folder: Path, bad: int, how: str, *options: str) -> tuple[dict[str, list[str]], str]:
    """Test -> what was reported of it, a "!" for one whose worker crashed; and all that was written."""
    (folder / "test_fake.py").write_text(FAKE.replace("BAD", str(bad)).replace("HOW", how))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on a GPU\n    kernels: no\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "--junitxml=out.xml",
        *options,
    ]
    path = os.pathsep.join([str(TESTS), str(TESTS / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(folder / "out.xml").iter("testcase"):
        text = "".join(ElementTree.tostring(child, "unicode") for child in case)
        result = "!" if "crashed while running" in text else case[0].tag if len(case) else "passed"
        found.setdefault(case.attrib["name"], []).append(result)
    return found, done.stdout + done.stderr


FINE = {f"test_it[{i}]": ["passed"] for i in range(9)} | {"test_another": ["passed"]}
PARALLEL = ("-n", "2", "--dist", "worksteal", "--max-worker-restart", "9")


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad,how,own", [(0, "return", "error"), (3, "synchronize()", "failure"), (8, "return", "error")]
)
def test_a_worker_whose_device_has_died_is_replaced(bad: int, how: str, own: str, tmp_path: Path) -> None:
    found, text = outcomes(tmp_path, bad, how, *PARALLEL)
    reports = found.pop(f"test_it[{bad}]")
    assert found == {k: v for k, v in FINE.items() if k != f"test_it[{bad}]"}, text
    assert own in reports, text
    assert "!" in reports
    assert "an illegal memory access" in text


@pytest.mark.slow
def test_without_workers_what_is_left_fails_at_once(tmp_path: Path) -> None:
    found, text = outcomes(tmp_path, 3, "synchronize()")
    assert [found[f"test_it[{i}]"][0] for i in range(4)] == ["passed"] * 3 + ["failure"]
    assert all(found[f"test_it[{i}]"] == ["error"] for i in range(4, 9)), text
    assert found["test_another"] == ["passed"], "it needs no GPU"
    assert (
        "not run: test_fake.py::test_it[3] left the CUDA device unusable (RuntimeError: CUDA error: an illegal" in text
    )


@pytest.mark.slow
def test_an_error_that_passes_ends_nothing(tmp_path: Path) -> None:
    found, text = outcomes(tmp_path, 3, "dead = False; raise RuntimeError('CUDA error: invalid argument')", *PARALLEL)
    assert found == FINE | {"test_it[3]": ["failure"]}, text
