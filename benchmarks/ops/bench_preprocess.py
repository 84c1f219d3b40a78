"""preprocess: every implementation against the reference, on the images of the three robots.

python -m dit4dit.benchmarks.ops.bench_preprocess --device cpu --json result.json
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.harness import assert_no_worse, quantiles, report, time_cpu, time_gpu

from dit4dit.ops import explain, preprocess, use_backend
from dit4dit.ops.preprocess import reference

# (sizes of the views, size of each in the result, filter)
CASES = {
    "2 x 256x256 cv2_area": ([(256, 256)] * 2, (224, 224), "cv2_area"),
    "2 x 256x256 bilinear": ([(256, 256)] * 2, (224, 224), "bilinear"),
    "1 x 800x1280 cv2_area": ([(800, 1280)], (224, 224), "cv2_area"),
    "1 x 480x640 cv2_area": ([(480, 640)], (224, 224), "cv2_area"),
    "2 x 224x224 as it is": ([(224, 224)] * 2, None, "cv2_area"),
}


def implementations(device: str) -> list[str]:
    """The ones that run on `device`, the reference last."""
    found: list[str] = []
    for name in ("cuda", "cpp", "torch"):
        with use_backend(preprocess=name):
            if explain("preprocess", device)[0].chosen == name:
                found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    timer = time_gpu if args.device.startswith("cuda") else time_cpu
    rows: list[dict[str, Any]] = []
    for case, (sizes, size, resize) in CASES.items():
        views = [torch.randint(0, 256, (1, h, w, 3), dtype=torch.uint8, generator=generator) for h, w in sizes]
        given = ([view.to(args.device) for view in views], size, resize, getattr(torch, args.dtype))
        found = {}
        for name in implementations(args.device):
            fn = partial(preprocess, backend=name)
            assert_no_worse(fn, reference, given)
            found[name] = quantiles(timer(partial(fn, *given), samples=args.samples))
        for name, times in found.items():
            rows.append({"case": case, "implementation": name, "ratio": found["torch"]["p50"] / times["p50"], **times})
    report(f"preprocess {args.dtype}", rows, args.json)


if __name__ == "__main__":
    main()
