"""Shared test data: two published-layout checkpoints with the published code's own results, and small things made of them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import dead_device
import numpy as np
import pytest
from interpreting import interpreter_fault

# Waiting threads must not spin: with another process on the cores a spinning test run is seventy times slower.
# Set before torch is imported, or it has no effect.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Test processes side by side (pytest -n) share the cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(workers))))

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = ("libero_tiny", "gr1_tiny")
KERNELS = {"interpreter", "small_build"}
"""Fixtures that run or compile kernels: a test that has one is marked `kernels`."""
MAY_BE_ABSENT = {"accelerate", "av", "diffusers", "matplotlib", "msgpack", "peft", "pyarrow", "scipy", "websockets"}
"""Packages without which the GPU tests are still collected: a machine with a GPU may have an image of its own."""


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.is_registered(dead_device):
        config.pluginmanager.register(dead_device)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A test file that imports one of MAY_BE_ABSENT is skipped where it is absent; every other error is one."""
    report = yield
    error = getattr(report.call.excinfo, "value", None)
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if name in MAY_BE_ABSENT and importlib.util.find_spec(name) is None:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {name} is not installed")
    return report


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What cannot run here is skipped, and says so: tests marked gpu, capture, cuda_build, and long unless they are asked for."""
    import torch

    from dit4dit import _C

    for item in items:
        if KERNELS & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.kernels)
        if "serial" in item.keywords:
            if "mark.serial" not in item.path.read_text():
                raise pytest.UsageError(
                    f"{item.path}: write pytest.mark.serial in it, or the Makefile does not find it"
                )
            if "PYTEST_XDIST_WORKER" in os.environ:
                item.add_marker(pytest.mark.skip(reason="runs alone: pytest -m serial, without -n"))

    if not _C.cuda_architectures:
        for item in items:
            if "cuda_build" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="this build has no CUDA kernels"))

    for item in items:
        if "long" in item.keywords and "long" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m long"))

    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:  # each allocation is a cudaMalloc, an error during capture
        for item in items:
            if "capture" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no graph is captured with PYTORCH_NO_CUDA_MEMORY_CACHING"))

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def interprets() -> None:
    """A test that interprets Triton's kernels is skipped where Triton is absent, or cannot with this NumPy."""
    triton = pytest.importorskip("triton")
    if fault := interpreter_fault(triton.__version__, np.__version__):
        pytest.skip(fault)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture
def libero_run(tmp_path: Path) -> Path:
    """A copy of the LIBERO checkpoint that a test may spoil."""
    return Path(shutil.copytree(GOLDEN / "libero_tiny", tmp_path / "libero_tiny"))


@pytest.fixture(scope="session")
def small_libero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LIBERO checkpoint with views of 32 x 32, for tests that look at other things than sizes."""
    run = Path(shutil.copytree(GOLDEN / "libero_tiny", tmp_path_factory.mktemp("small") / "libero_tiny"))
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("    image_size:\n    - 224\n    - 224", "    image_size: [32, 32]"))
    assert config.read_text() != text
    return run


@pytest.fixture(scope="session")
def libero_policy(small_libero: Path):
    from dit4dit import Policy

    return Policy.from_pretrained(small_libero, device="cpu")


@pytest.fixture(scope="session")
def gr1_policy():
    from dit4dit import Policy

    return Policy.from_pretrained(GOLDEN / "gr1_tiny", device="cpu")


def libero_observation(seed: int = 0, side: int = 256):
    """Random pictures and joints, as LIBERO's embodiment names them."""
    from dit4dit import Observation

    rng = np.random.default_rng(seed)
    keys = ("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper")
    return Observation(
        images={v: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for v in ("primary_image", "wrist_image")},
        state={key: rng.uniform(-1, 1, 1).astype(np.float32) for key in keys},
    )


@pytest.fixture
def observation():
    return libero_observation()


@pytest.fixture
def make_observation():
    return libero_observation


@pytest.fixture(scope="session")
def cosmos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Cosmos-Predict2.5 folder: the fixture's, whose text encoder transformers saved, and two parts of its .pt."""
    from safetensors.torch import save_file

    from dit4dit.checkpoints import checkpoint as ck

    source = GOLDEN / "libero_tiny"
    target = tmp_path_factory.mktemp("cosmos") / "Cosmos-Predict2.5-2B"
    shutil.copytree(source / "cosmos", target)
    tensors = ck.load_pt(source / "checkpoints" / "steps_10_pytorch_model.pt")
    for part in ("vae", "transformer"):
        prefix = f"{ck.EXTRACTOR}{part}."
        state = {n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
        save_file(state, target / part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="session", autouse=True)
def _data_cache(tmp_path_factory: pytest.TempPathFactory):
    """Caches of data sets go to a folder of this run."""
    before = os.environ.get("DIT4DIT_CACHE")
    os.environ["DIT4DIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DIT4DIT_CACHE"]
    else:
        os.environ["DIT4DIT_CACHE"] = before


LIBERO_CAMERAS = ("observation.images.image", "observation.images.wrist_image")


def libero_gripper(number: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """LIBERO's gripper in an episode that closes it (an even number) or opens it: command [length], 1 = open, and the two finger
    joints [length, 2] in metres, which follow one frame later at 2 cm a frame.
    """
    command = (np.arange(length) < (length + 1) // 2) == (number % 2 == 0)
    opening = np.empty(length)
    at = 0.08 * command[0]
    for frame in range(length):
        at += float(np.clip(0.08 * command[max(0, frame - 1)] - at, -0.02, 0.02))
        opening[frame] = at
    return command.astype(np.float32), np.stack([opening / 2, -opening / 2], axis=1).astype(np.float32)


def make_libero_episode(number: int, length: int, height: int = 24, width: int = 32):
    """Columns and pictures of an episode with LIBERO's keys; random but for the gripper, the same for the same arguments."""
    rng = np.random.default_rng(number)
    columns = {
        "observation.state": rng.normal(size=(length, 8)).astype(np.float32),
        "action": rng.normal(size=(length, 7)).astype(np.float32),
    }
    columns["action"][:, 6], columns["observation.state"][:, 6:] = libero_gripper(number, length)
    return columns, {c: rng.integers(0, 256, (length, height, width, 3), dtype=np.uint8) for c in LIBERO_CAMERAS}


@pytest.fixture(scope="session")
def libero_episode():
    return make_libero_episode


@pytest.fixture(scope="session")
def write_libero():
    """Write a small data set with LIBERO's keys, pictures kept to the bit: write_libero(folder, version=..., lengths=...)."""
    from dit4dit.data.writer import VideoCodec, Writer

    def write(root: Path, lengths=(12, 9, 17, 11), **options) -> Path:
        with Writer(root, 10, **{"codec": VideoCodec.lossless(), "episodes_per_file": 3, **options}) as writer:
            for number, length in enumerate(lengths):
                writer.add(*make_libero_episode(number, length), f"task {number % 2}")
        return root

    return write


@pytest.fixture(scope="session")
def libero_data(write_libero, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets with the same four episodes: v2.0, v2.1 and v3.0. Not to be written to."""
    root = tmp_path_factory.mktemp("data")
    for version in ("v2.0", "v2.1", "v3.0"):
        write_libero(root / version, version=version)
    return root


@pytest.fixture
def copy(libero_data: Path, tmp_path: Path):
    """Copy a data set of `libero_data`, which a test may spoil: copy("v2.1")."""

    def of(version: str) -> Path:
        return Path(shutil.copytree(libero_data / version, tmp_path / "set"))

    return of


@pytest.fixture
def main(capsys):
    """The command line in this process: main("data", "check", folder) -> exit code, stdout, stderr."""
    from dit4dit import cli

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in words])
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    return call
