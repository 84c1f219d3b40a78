"""A folder that looks like a simulator's environment, with this interpreter in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dit4dit.evaluation.simulators import STAMP, Simulator


def libero_environment(folder: Path) -> Simulator:
    simulator = Simulator.at("libero", folder)
    (folder / "bin").mkdir(parents=True)
    simulator.python.symlink_to(sys.executable)
    (folder / "lib" / "python3.11" / "site-packages" / "libero" / "libero").mkdir(parents=True)
    (folder / STAMP).write_text(json.dumps({"lock": "", "first": ""}))
    return simulator
