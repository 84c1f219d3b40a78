"""Writes `identity.json` and `before_the_house/`: what the code said, and two folders that it wrote, before its files were moved.

    PYTHONPATH=tests/helpers OMP_NUM_THREADS=1 python tests/golden/make_identity.py

Run once, on 2484c7c, the last commit before that; paths of that machine were then replaced in the two folders. Never run it on
later code: what people have on their disks was written by the old one, and `tests/house/test_identity.py` compares with it.
"""

import contextlib
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import identity_facts as facts
import torch

from dit4dit.training.loop import train

HERE = Path(__file__).parent
BEFORE = HERE / "before_the_house"


def main() -> None:
    torch.set_num_threads(1)
    logging.disable()
    shutil.rmtree(BEFORE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "checkpoints": {name: facts.checkpoint_facts(path) for name, path in facts.CHECKPOINTS.items()},
            "data": facts.data_facts(folder),
            "caches": facts.cache_facts(folder),
            "streams": facts.stream_facts(),
            "training": facts.training_facts(folder),
            "evaluation": facts.evaluation_facts(BEFORE / "evaluation"),
        }
        # the whole run whose first half is kept, to compare with what goes on from it
        config = facts.least_run(folder / "whole", 4)
        assert train(config, facts.least_data(config.model)) == 0
        found["resumed"] = facts.run_facts(folder / "whole")
    config = facts.least_run(BEFORE / "run", 2)
    assert train(config, facts.least_data(config.model)) == 0
    for folder in (BEFORE / "evaluation" / "videos", BEFORE / "evaluation" / "logs"):
        with contextlib.suppress(OSError):
            folder.rmdir()
    found["machine"] = {"machine": facts.machine()}
    # a line for each fact
    sections = [
        f"{json.dumps(section)}: {{\n"
        + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in facts_.items())
        + "\n}"
        for section, facts_ in found.items()
    ]
    (HERE / "identity.json").write_text("{\n" + ",\n".join(sections) + "\n}\n")


if __name__ == "__main__":
    if (HERE / "identity.json").exists():
        sys.exit("identity.json is there: it was written by the old code and is not made again")
    main()
