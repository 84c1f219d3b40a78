"""Which Triton interprets kernels with which NumPy."""

from __future__ import annotations

from packaging.version import Version


def interpreter_fault(triton: str, numpy: str) -> str | None:
    """Why a Triton cannot interpret with a NumPy, or None; compiled kernels run with both.

    Its interpreter before 3.7 takes an array of one element for a number, which NumPy from 2.4 on refuses.
    """
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return f"Triton {triton} cannot interpret with NumPy {numpy}: it needs Triton 3.7, or NumPy before 2.4"
    return None
