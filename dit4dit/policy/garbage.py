"""Python's garbage collector beside a control loop: a full collection looks at every object, and stops the process meanwhile."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Collect once, then leave everything that is alive now out of all collections to come (`gc.freeze`).

    It holds for the whole process. What is frozen is freed as ever when its last reference goes; only reference cycles in it
    stay, until `gc.unfreeze()` and `gc.collect()`. Objects made later are collected as ever: call it again after more of them
    were made to stay. Calling it twice does no harm.
    """
    gc.collect()
    gc.freeze()
