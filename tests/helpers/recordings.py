"""Small recordings with two cameras, and the files of a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dit4dit.data.writer import Writer

TOP, WRIST = "observation.images.top", "observation.images.wrist"
VERSIONS = ("v2.0", "v2.1", "v3.0")


def episode(number: int, length: int) -> list[tuple[dict, dict, str]]:
    """Frames with two cameras of unequal sizes and numbers of four kinds, a function of the number."""
    random = np.random.default_rng(number)
    return [
        (
            {
                "observation.state": random.normal(size=3).astype(np.float32),
                "action": random.normal(size=2),
                "observation.grasped": bool(i % 2),
                "observation.count": 10 * number + i,
            },
            {
                TOP: random.integers(0, 256, (16, 24, 3), dtype=np.uint8),
                WRIST: random.integers(40, 200, (8, 8, 3), dtype=np.uint8),
            },
            f"task {number}",
        )
        for i in range(length)
    ]


def record(writer: Writer, number: int, length: int) -> list[tuple[dict, dict, str]]:
    frames = episode(number, length)
    for frame in frames:
        writer.append(*frame)
    return frames


def files(root: Path) -> set[str]:
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
