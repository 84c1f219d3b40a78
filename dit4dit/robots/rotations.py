"""Rotations between the representations that data sets store and robots want; NumPy, float64, any leading axes.

Conventions are the published code's: quaternions are (w, x, y, z), Euler angles are intrinsic in the order of their letters
(r, p, y stand for x, y, z), `rotation_6d` holds the first two rows of the matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import ConfigError, DataError, shown

Array = NDArray[np.float64]
LEAST = 1e-3
"""Lengths below are noise about zero: their direction says nothing."""


def from_axis_angle(x: Array) -> Array:
    """[..., 3], axis times angle in radians -> [..., 3, 3] (Rodrigues)."""
    angle = np.linalg.norm(x, axis=-1, keepdims=True)
    axis = np.divide(x, angle, out=np.zeros_like(x), where=angle > 0)
    k = np.zeros((*x.shape[:-1], 3, 3))
    k[..., 0, 1], k[..., 0, 2], k[..., 1, 2] = -axis[..., 2], axis[..., 1], -axis[..., 0]
    k -= np.swapaxes(k, -1, -2)
    angle = angle[..., None]
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def from_quaternion(x: Array) -> Array:
    """[..., 4] as (w, x, y, z) of any length but zero -> [..., 3, 3]."""
    w, i, j, k = np.moveaxis(x / np.linalg.norm(x, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (j * j + k * k), 2 * (i * j - k * w), 2 * (i * k + j * w)],
        [2 * (i * j + k * w), 1 - 2 * (i * i + k * k), 2 * (j * k - i * w)],
        [2 * (i * k - j * w), 2 * (j * k + i * w), 1 - 2 * (i * i + j * j)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def from_euler(x: Array, order: str) -> Array:
    """[..., 3] radians about the axes in `order` ("xyz"), each about the turned frame -> [..., 3, 3]."""
    out = np.broadcast_to(np.eye(3), (*x.shape[:-1], 3, 3))
    for i, letter in enumerate(order):
        about = np.zeros_like(x)
        about[..., "xyz".index(letter)] = x[..., i]
        out = out @ from_axis_angle(about)
    return out


def from_6d(x: Array) -> Array:
    """[..., 6], two rows that need not be orthonormal yet -> [..., 3, 3] (Gram-Schmidt)."""
    first = x[..., :3] / np.linalg.norm(x[..., :3], axis=-1, keepdims=True)
    second = x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def to_quaternion(m: Array) -> Array:
    """[..., 3, 3] -> [..., 4] as (w, x, y, z), w >= 0."""
    d = m[..., (0, 1, 2), (0, 1, 2)]
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    size = np.sqrt(np.maximum(0.0, 1.0 + d @ signs.T))  # twice each component's magnitude
    w, x, y, z = np.moveaxis(size, -1, 0)
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    p, q, r = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    rows = [[w * w, a, b, c], [a, x * x, p, q], [b, p, y * y, r], [c, q, r, z * z]]
    # row i is the quaternion times its i-th component: the row of the largest one loses no digits
    candidates = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    best = np.take_along_axis(candidates, size.argmax(-1)[..., None, None], axis=-2)[..., 0, :]
    best = best / np.linalg.norm(best, axis=-1, keepdims=True)
    return np.where(best[..., :1] < 0, -best, best)


def to_axis_angle(m: Array) -> Array:
    """[..., 3, 3] -> [..., 3], angle in 0..pi."""
    q = to_quaternion(m)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., :1])
    scale = np.divide(angle, sine, out=np.full_like(angle, 2.0), where=sine > 1e-12)
    return q[..., 1:] * scale


TARGETS: dict[str, tuple[int, Callable[[Any], Array]]] = {
    "axis_angle": (3, to_axis_angle),
    "quaternion": (4, to_quaternion),
    "rotation_6d": (6, lambda m: m[..., :2, :].reshape(*m.shape[:-2], 6)),
    "matrix": (9, lambda m: m.reshape(*m.shape[:-2], 9)),
}
"""Representation -> how many values it has, and how it comes from matrices [..., 3, 3]."""

_SOURCES: dict[str, Callable[[Any], Array]] = {
    "axis_angle": from_axis_angle,
    "quaternion": from_quaternion,
    "rotation_6d": from_6d,
    "matrix": lambda x: x.reshape(*x.shape[:-1], 3, 3),
}


def zero_is_no_turn(name: str | None) -> bool:
    """Whether zeros in this representation turn nothing; as quaternion, matrix or rotation_6d they are no rotation at all. None
    is no rotation."""
    return name is None or name == "axis_angle" or _euler_order(name) is not None


def source_size(name: str, where: str) -> int:
    """How many values the representation `name` has; ConfigError when it is unknown."""
    if _euler_order(name) is not None:
        return 3
    if name not in _SOURCES:
        known = ", ".join([*_SOURCES, "euler_angles_rpy"])
        raise ConfigError(f"{where}: rotation_type: expected one of {known}, got {shown(name)}")
    return TARGETS[name][0]


def no_rotation(x: NDArray[Any], source: str) -> tuple[int, str] | None:
    """The first of the rows [n, source's size] that is no rotation, and why."""
    finite = np.isfinite(x).all(axis=-1)
    wide = np.where(finite[:, None], np.asarray(x, dtype=np.float64), 0.0)
    if source == "quaternion":
        bad, why = np.linalg.norm(wide, axis=-1) < LEAST, "a quaternion of length 0"
    elif source == "rotation_6d":
        sizes = np.linalg.norm(wide.reshape(-1, 2, 3), axis=-1)
        across = np.linalg.norm(np.cross(wide[:, :3], wide[:, 3:]), axis=-1)
        bad = (sizes < LEAST).any(axis=1) | (across < LEAST * sizes.prod(axis=1))
        why = "two rows of a matrix that are 0 or parallel"
    elif source == "matrix":
        m = wide.reshape(-1, 3, 3)
        off = np.abs(m @ np.swapaxes(m, 1, 2) - np.eye(3)).max(axis=(1, 2))
        bad, why = (off > 0.02) | (np.linalg.det(m) < 0), "a matrix whose rows are not orthonormal and right-handed"
    else:  # any three numbers are angles
        bad, why = np.zeros(len(wide), dtype=bool), ""
    bad |= ~finite
    if not bad.any():
        return None
    row = int(bad.argmax())
    shown = ", ".join(f"{value:g}" for value in x[row])
    return row, f"expected a rotation, got {why if finite[row] else 'NaN or infinite values'}: {shown}"


def convert(x: NDArray[Any], source: str, target: str) -> NDArray[np.float32]:
    """[..., source's size] -> float32 [..., target's size]; the same numbers where the two are one.

    Raises:
        DataError: values that are no rotation, which would become NaN.
    """
    if source == target:
        return x.astype(np.float32)
    wide = np.asarray(x, dtype=np.float64)
    wrong = no_rotation(wide.reshape(-1, wide.shape[-1]), source)
    if wrong is not None:
        raise DataError(f"row {wrong[0]}: {wrong[1]}; `dit4dit data check --robot` names the file")
    order = _euler_order(source)
    matrix = from_euler(wide, order) if order is not None else _SOURCES[source](wide)
    return TARGETS[target][1](matrix).astype(np.float32)


def _euler_order(name: str) -> str | None:
    found = re.fullmatch(r"euler_angles_([rpyxz]{3})", name)
    letters = "" if found is None else found[1]
    if set(letters) == set("rpy"):
        return letters.translate(str.maketrans("rpy", "xyz"))
    return letters if set(letters) == set("xyz") else None
