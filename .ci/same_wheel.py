"""Was anything lost from the wheel? Two wheels' files: data must be in both, byte for byte, wherever it lies; modules may change.

same_wheel.py BEFORE.whl AFTER.whl          exit code 1 where data are lost or changed, or the entry points differ
"""

import argparse
import hashlib
import sys
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

CODE = {".py", ".pyi", ".so", ".h", ".cmake"}


def files(wheel: Path) -> dict[str, str]:
    """Name -> SHA-256 of each file, but for the wheel's own list of them."""
    if not zipfile.is_zipfile(wheel):
        sys.exit(f"{wheel}: no wheel; make one with `make wheel` or python -m build --wheel")
    with zipfile.ZipFile(wheel) as opened:
        return {
            name: hashlib.sha256(opened.read(name)).hexdigest()
            for name in opened.namelist()
            if not name.endswith(("/", ".dist-info/RECORD", ".dist-info/METADATA", ".dist-info/WHEEL"))
        }


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("before", type=Path)
parser.add_argument("after", type=Path)
args = parser.parse_args()
before, after = files(args.before), files(args.after)

places = defaultdict(list)
for name, digest in after.items():
    places[digest].append(name)
lost = 0
for name, digest in sorted(before.items()):
    if name in after and after[name] == digest:
        continue
    code = PurePosixPath(name).suffix in CODE
    if digest in places:
        print(f"moved: {name} -> {', '.join(places[digest])}")
    elif code:
        print(f"{'changed' if name in after else 'gone'}: {name}")
    else:
        lost += 1
        print(f"LOST: {name}" if name not in after else f"CHANGED DATA: {name}")
for name in sorted(after.keys() - before.keys()):
    if after[name] not in before.values():
        print(f"new: {name}")
print(f"{len(before)} files before, {len(after)} after; {lost} data files lost or changed")
sys.exit(bool(lost))
