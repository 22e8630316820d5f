#!/usr/bin/env bash
# Training on several machines under SLURM: two nodes of eight GPUs here. Edit the #SBATCH lines for your cluster.
#
#   sbatch scripts/slurm_train.sh vdot_14b data.encoded=/shared/encoded parallel.replicas=2
#
# SLURM starts one process per GPU, no torchrun between, so that signals reach training itself. Five minutes before the
# time limit this script gets SIGUSR1 and hands it on; training saves and leaves with exit code 0, the job queues itself
# again, and the same command goes on where it was. The repository with its .venv, the data and results/ must be where all nodes see them.
#SBATCH --job-name=vdot
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vdot-%j.log
set -euo pipefail

# sbatch runs a copy of this file: the repository is where the job was sent from, or $VDOT_ROOT.
root="${VDOT_ROOT:-${SLURM_SUBMIT_DIR:?start this with sbatch}}"
if [[ ! -f "$root/training/train.py" ]]; then
    echo "error: $root is not the repository: submit from there, or set VDOT_ROOT" >&2
    exit 2
fi
config="${1:?a name of configs/train, for example vdot_14b}"
shift
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"

stopped=""
srun --kill-on-bad-exit=1 bash -c '
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
    export LOCAL_WORLD_SIZE="$((SLURM_NTASKS / SLURM_NNODES))"
    exec "$@"' bash "$root/.venv/bin/python" "$root/training/train.py" --config "$config" "$@" &
job=$!
trap 'stopped=yes; kill -USR1 "$job"' USR1

# A signal ends `wait` early: it is called again until srun itself has ended.
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do
    code=0
    wait "$job" || code=$?
done
if [[ -n "$stopped" && "$code" -eq 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
