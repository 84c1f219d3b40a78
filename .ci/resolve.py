"""An installed wheel where nothing can be compiled: every launch of the released models is found among its cubins.

resolve.py CAPABILITY...       with a PATH that has no compiler and a TRITON_CACHE_DIR that cannot be written
"""

import os
import shutil
import sys
from pathlib import Path

sys.modules["triton"] = None  # type: ignore[assignment]  # importing it fails

from dit4dit.aot_build import released  # noqa: E402
from dit4dit.ops.aot import loader, manifest  # noqa: E402

for tool in ("cc", "gcc", "clang", "nvcc", "ptxas"):
    assert shutil.which(tool) is None, f"{tool} is on PATH"
try:
    Path(os.environ["TRITON_CACHE_DIR"]).mkdir(parents=True)
    raise AssertionError("TRITON_CACHE_DIR can be written")
except OSError:
    pass

found = manifest.installed()
assert isinstance(found, manifest.Manifest), found
for model in ("robocasa_gr1", "libero"):
    calls = [call for v in released.VARIANTS if v.model == model for call in released.record(v, (1, 4))]
    for capability in map(int, sys.argv[1:]):
        steps = released.launches(calls, capability)
        for step in steps:
            row = loader.find(step, str(capability))
            assert isinstance(row, manifest.Compiled), row
            assert found.image(row)[:4] == b"\x7fELF"
        kernels = {step.kernel for step in steps}
        assert len(kernels) >= 10, kernels
        print(f"{model}: {len(steps)} kinds of launches of {len(kernels)} kernels for sm_{capability}, none to compile")
