#!/usr/bin/env bash
# Train VDOT: bash training/train_vdot.sh [config] [key=value...] [--dry_run]
#
# config is a name of configs/train (default: tiny, which needs no GPU and no data) or a YAML file. One process per GPU
# of this machine, or one on the CPU; NPROC=2 sets their number. Several machines: run it on each with
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine MASTER_PORT=29500 bash training/train_vdot.sh vdot_14b
# or under SLURM with scripts/slurm_train.sh. The same command goes on where it was stopped.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
config=tiny
if [[ $# -gt 0 && "$1" != *=* && "$1" != -* ]]; then
    config="$1"
    shift
fi
source "$root/scripts/env.sh"
use_env train
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
nproc="${NPROC:-$((gpus > 0 ? gpus : 1))}"
nnodes="${NNODES:-1}"
command=("$root/training/train.py" --config "$config" "$@")
if [[ "$nproc" -eq 1 && "$nnodes" -eq 1 ]]; then
    exec python "${command[@]}"
fi
where=(--nnodes "$nnodes" --nproc_per_node "$nproc")
if [[ "$nnodes" -gt 1 ]]; then
    where+=(--node_rank "${NODE_RANK:?the number of this machine, from 0}" --master_addr "${MASTER_ADDR:?the first machine}")
    where+=(--master_port "${MASTER_PORT:-29500}")
else
    where+=(--standalone)
fi
exec python -m torch.distributed.run "${where[@]}" "${command[@]}"
