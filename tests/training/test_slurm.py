"""The Slurm script, with stand-ins for Slurm's commands: every task knows its rank, and a saved run queues itself again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import dit4dit

SCRIPT = Path(dit4dit.__file__).parent / "training" / "slurm.sh"
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "scontrol $*" >>"$NOTES"; fi',
    "srun": 'shift; code=0; for r in 0 1; do SLURM_PROCID=$r SLURM_LOCALID=$r SLURM_NTASKS=2 "$@" || code=$?; done; exit $code',
    "dit4dit": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" >>"$NOTES"; exit $CODE',
}


@pytest.mark.parametrize("code, restarts", [(0, 0), (75, 0), (75, 1), (2, 1)])
def test_slurm_script(code: int, restarts: int, tmp_path: Path) -> None:
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"
    facts = {
        "NOTES": notes,
        "CODE": code,
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": 12,
        "SLURM_RESTART_COUNT": restarts,
    }
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **{k: str(v) for k, v in facts.items()}}
    ended = subprocess.run(["bash", str(SCRIPT), "--recipe", "libero", "--run.out", "a b"], env=env, check=False)
    assert ended.returncode == code
    resume = " --resume auto" if restarts else ""
    told = [f"{rank} {rank} 2 node7 29500: train --recipe libero --run.out a b{resume}" for rank in (0, 1)]
    assert notes.read_text().splitlines() == told + ["scontrol requeue 12"] * (code == 75)
