"""Were tests lost? Two lists of `pytest --collect-only -q`: a test may have moved to another file, and must be there.

same_tests.py BEFORE AFTER          exit code 1 where a test is lost
"""

import argparse
import sys
from collections import Counter
from pathlib import Path


def collected(file: Path) -> list[str]:
    ids = [line for line in file.read_text().splitlines() if "::" in line] if file.is_file() else []
    if not ids:
        sys.exit(f"{file}: no such file, or no test in it; make it with pytest --collect-only -q")
    return ids


def name(test: str) -> str:
    """Without the file: class, function and parameters."""
    return test.partition("::")[2]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("before", type=Path)
parser.add_argument("after", type=Path)
args = parser.parse_args()
before, after = collected(args.before), collected(args.after)
gone, new = set(before) - set(after), set(after) - set(before)
lost = Counter(map(name, gone)) - Counter(map(name, new))
moved = len(gone) - lost.total()
print(f"{len(before)} tests before, {len(after)} after: {moved} moved, {len(new) - moved} new, {lost.total()} lost")
for one in sorted(gone):
    if lost[name(one)]:
        print(f"lost: {one}")
sys.exit(bool(lost))
