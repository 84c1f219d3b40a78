"""Shared test data: two published-layout checkpoints with the published code's own results, and small things made of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

# Waiting threads must not spin: with another process on the cores a spinning test run is seventy times slower.
# Set before torch is imported, or it has no effect.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = ("libero_tiny", "gr1_tiny")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, and say so, where PyTorch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
    """A complete Cosmos-Predict2.5 folder: the fixture's small files and, from its .pt, the three weight files."""
    from safetensors.torch import save_file

    from dit4dit.model import checkpoint as ck

    source = GOLDEN / "libero_tiny"
    target = tmp_path_factory.mktemp("cosmos") / "Cosmos-Predict2.5-2B"
    shutil.copytree(source / "cosmos", target)
    tensors = ck.load_pt(source / "checkpoints" / "steps_10_pytorch_model.pt")
    files = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "transformer": "diffusion_pytorch_model"}
    for part, name in files.items():
        prefix = f"{ck.EXTRACTOR}{part}."
        state = {n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
        save_file(state, target / part / f"{name}.safetensors", metadata={"format": "pt"})
    return target
