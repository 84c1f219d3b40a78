"""Make cv2_area.npz: what OpenCV's INTER_AREA gives on uint8, as the truth for `preprocess(resize="cv2_area")`.

Run once, in an environment that has opencv-python-headless and numpy (this package needs neither for it):

    python tests/golden/make_cv2_area.py

Inputs are not stored: `image(height, width)` below makes them again from the size. Small results are stored whole,
large ones as a corner and a SHA-256 of the whole.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np

# (height, width) -> (height, width); the test reads the sizes from the names in the file
SMALL = [
    ((32, 40), (28, 35)),  # both axes shrink by a fraction
    ((33, 47), (17, 23)),  # odd sizes
    ((40, 31), (7, 30)),  # very different factors
    ((19, 23), (1, 1)),  # one pixel
    ((9, 50), (9, 20)),  # one axis keeps its size
    ((50, 9), (20, 9)),
    ((32, 48), (16, 24)),  # factor 2: shift and round half up
    ((36, 27), (12, 9)),  # factor 3
    ((32, 40), (8, 8)),  # factors 4 and 5
    ((30, 20), (10, 20)),  # factors 3 and 1
    ((36, 31), (18, 20)),  # factor 2 on one axis only
    ((12, 13), (30, 29)),  # both axes enlarge
    ((16, 16), (32, 32)),  # factor 2 enlarging
    ((11, 17), (12, 18)),  # enlarging a little
    ((1, 1), (5, 4)),  # nothing to interpolate
    ((1, 9), (3, 25)),
    ((40, 12), (25, 19)),  # one axis shrinks, the other enlarges
    ((13, 44), (21, 17)),
    ((13, 44), (21, 44)),  # one axis enlarges, the other keeps its size
    ((30, 12), (10, 24)),  # factor 3 down, factor 2 up
    ((21, 22), (21, 22)),  # same size
]
LARGE = [
    ((256, 256), (224, 224)),
    ((480, 640), (224, 224)),
    ((800, 1280), (224, 224)),
    ((448, 448), (224, 224)),
    ((720, 1280), (224, 448)),
    ((128, 160), (224, 224)),
    ((257, 511), (96, 83)),
]
CORNER = 8


def image(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], every value equally likely, the same on every machine."""
    generator = np.random.Generator(np.random.PCG64([height, width]))
    return generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def main() -> None:
    stored: dict[str, np.ndarray] = {"cv2_version": np.array(cv2.__version__)}
    for source, target in SMALL + LARGE:
        result = cv2.resize(image(*source), (target[1], target[0]), interpolation=cv2.INTER_AREA)
        name = "{}x{}_to_{}x{}".format(*source, *target)
        if (source, target) in LARGE:
            stored[f"corner_{name}"] = result[-CORNER:, -CORNER:]
            stored[f"sha256_{name}"] = np.array(hashlib.sha256(result.tobytes()).hexdigest())
        else:
            stored[f"whole_{name}"] = result
    np.savez_compressed(Path(__file__).with_name("cv2_area.npz"), **stored)


if __name__ == "__main__":
    main()
