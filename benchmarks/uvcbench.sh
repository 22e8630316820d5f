# Sourced by uvcbench_single.sh and uvcbench_composite.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/env.sh"

run_uvcbench() {
  local split="$1" bench=() launch=(python)
  shift
  use_env
  case " $* " in *" --bench_dir"*) ;; *) bench=(--bench_dir "$ROOT/benchmarks/uvcbench_tiny") ;; esac
  if [ "${NPROC:-1}" -gt 1 ]; then launch=(torchrun --standalone "--nproc_per_node=$NPROC"); fi
  "${launch[@]}" "$ROOT/inference/uvcbench.py" --split "$split" "${bench[@]}" "$@"
}
