#!/usr/bin/env bash
# Train on several machines under SLURM: sbatch [--nodes N] scripts/slurm_train.sh config [key=value...]
#
#   sbatch --nodes 1 scripts/slurm_train.sh vdot_14b data.encoded=/data/encoded
#   sbatch --nodes 4 scripts/slurm_train.sh vdot_14b data.encoded=/data/encoded batch_size=16 parallel.replicas=4
#
# An example: partition, account, time and GPUs are yours to set. Submit it from the repository, whose .venv must be
# there on every machine (bash scripts/test.sh makes it), and keep output_dir and data on a disk that all of them see.
#
# SLURM starts one process per GPU, without torchrun: its agent would end the processes 30 s after a signal, and a step
# at 14B takes longer. Five minutes before the time is up (or at scancel --signal=USR1) training finishes its step and
# saves; the job then goes back into the queue and resumes where it was. Done, it does not. A machine that fails
# requeues the job as well, and it resumes from the last checkpoint.
#SBATCH --job-name=vdot
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
root="${SLURM_SUBMIT_DIR:-$PWD}"  # SLURM runs a copy of this file from elsewhere
config="${1:?a name of configs/train, or a YAML file}"
shift
[[ -x "$root/.venv/bin/python" ]] || { echo "no .venv in $root: submit from the repository" >&2; exit 2; }

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# exec, so that the signal reaches Python itself.
# shellcheck disable=SC2016  # expanded by each task
srun --kill-on-bad-exit=1 bash -c '
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
    export LOCAL_WORLD_SIZE="$((SLURM_NTASKS / SLURM_NNODES))"
    exec "$@"
' task "$root/.venv/bin/python" "$root/training/train.py" --config "$config" "$@" &
run=$!

warned=false
trap 'warned=true; kill -USR1 "$run"' USR1  # srun passes it on to all tasks
code=0
wait "$run" || code=$?
while [[ "$code" -eq $((128 + $(kill -l USR1))) ]]; do  # the trap ended the wait, not the run
    code=0
    wait "$run" || code=$?
done
if [[ "$warned" == true && "$code" -eq 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
