"""An installed wheel with NumPy alone: it imports, resizes an image, and holds what it was built with, C++ headers included.

smoke.py [--cubins MANIFEST] ARCHITECTURE...     MANIFEST: of the Triton kernels that were compiled ahead of time
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import dit4dit
from dit4dit import _C

parser = argparse.ArgumentParser()
parser.add_argument("--cubins", type=Path)
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
folder = Path(dit4dit.__file__).parent / "cubins"
if args.cubins is None:
    assert not [*folder.rglob("*.cubin"), *folder.glob("*.json")], "built without kernels compiled ahead of time"
else:
    assert (folder / "manifest.json").read_bytes() == args.cubins.read_bytes()
    for rows in json.loads(args.cubins.read_text())["kernels"].values():
        assert rows
        for row in rows:
            assert hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest() == row["sha256"]
for option, wanted in (("--include-dir", "dit4dit/action_stream.h"), ("--cmake-dir", "dit4ditConfig.cmake")):
    found = subprocess.run(
        [sys.executable, "-m", "dit4dit.control", option], capture_output=True, text=True, check=True
    )
    assert (Path(found.stdout.rstrip("\n")) / wanted).is_file(), f"no {wanted} in {found.stdout}"
headers = Path(dit4dit.__file__).parent / "include" / "dit4dit"
unread, read = {"action_stream.h"}, set()
while unread:
    name = unread.pop()
    read.add(name)
    unread |= {*re.findall(r'^#include "(.+)"', (headers / name).read_text(), re.MULTILINE)} - read
assert len(read) >= 8, f"dit4dit/action_stream.h is made of {sorted(read)} alone"
print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}: dit4dit {dit4dit.__version__}, {_C.build_info()}")
