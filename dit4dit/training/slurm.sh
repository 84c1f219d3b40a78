#!/usr/bin/env bash
# One training run on several nodes:  sbatch --nodes 8 slurm.sh --recipe libero --run.out /shared/runs/libero
#
# Two minutes before the end Slurm sends SIGTERM to every process; the run saves, ends with exit code 75, and this job queues itself
# again and goes on. Run folder, caches and data must be on a file system that all nodes see.
# One task a GPU and no torchrun, which would kill its workers 30 seconds after the signal, in the middle of a large save.
#SBATCH --job-name=dit4dit
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"
words=("$@")
# a job that was queued again goes on where it stopped, or begins where there is no checkpoint yet
[[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]] && words+=(--resume auto)

# shellcheck disable=SC2016  # each task fills in its own numbers
srun --kill-on-bad-exit=0 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec dit4dit train "$@"' - "${words[@]}"
code=$?
if [[ $code -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
