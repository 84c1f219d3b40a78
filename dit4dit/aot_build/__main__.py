"""Compile every Triton kernel of the released models ahead of time, for a build with -Ccmake.define.DIT4DIT_CUBINS=FOLDER.

python -m dit4dit.aot_build --out build/cubins          needs triton, no GPU
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from dit4dit.aot_build import compiler, released


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, or none yet")
    parser.add_argument("--capability", type=int, action="append", choices=released.CAPABILITIES, help="default: all")
    parser.add_argument("--model", action="append", choices=released.MODELS, help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    begin = time.monotonic()
    models = args.model or released.MODELS
    calls = [call for v in released.VARIANTS if v.model in models for call in released.record(v)]
    wanted = {
        capability: [special for special, _ in released.specializations(calls, capability).values()]
        for capability in args.capability or released.CAPABILITIES
    }
    manifest = compiler.build(args.out.resolve(), wanted, args.jobs)
    size = sum(path.stat().st_size for path in args.out.rglob("*.cubin"))
    count = sum(map(len, manifest.kernels.values()))
    print(f"{args.out}: {count} kernels, {size / 1e6:.1f} MB, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
