"""An installed wheel with NumPy alone: it imports, resizes a picture, and holds what it was built with.

smoke.py [--cubins N] ARCHITECTURE...     N: how many Triton kernels were compiled ahead of time
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import dit4dit
from dit4dit import _C

parser = argparse.ArgumentParser()
parser.add_argument("--cubins", type=int, default=0)
parser.add_argument("architectures", nargs="*")
args = parser.parse_args()

image = np.full((1, 256, 256, 3), 255, np.uint8)
for dtype in (np.float32, np.float16):
    result = np.full((1, 3, 224, 224), np.nan, dtype)
    _C.preprocess([image], [224], result, "cv2_area")
    assert (result == 1).all(), "a white picture must stay white"
assert "torch" not in sys.modules
assert set(_C.cuda_architectures) == set(args.architectures), (
    f"built for {_C.cuda_architectures}, expected {args.architectures}"
)
manifest = Path(dit4dit.__file__).parent / "cubins" / "manifest.json"
kernels = json.loads(manifest.read_text())["kernels"] if manifest.is_file() else {}
assert sum(map(len, kernels.values())) == args.cubins, f"{kernels.keys()}: expected {args.cubins} kernels"
print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}: dit4dit {dit4dit.__version__}, {_C.build_info()}")
