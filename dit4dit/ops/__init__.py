"""The operations that are worth writing by hand: each has one name, a reference, and a list of implementations."""

from dit4dit.ops.dispatch import Explanation, explain, names, trace, use_backend
from dit4dit.ops.preprocess import preprocess

__all__ = ["Explanation", "explain", "names", "preprocess", "trace", "use_backend"]
