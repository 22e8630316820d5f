#!/usr/bin/env bash
# UVCBench's eight tasks with one condition: generate, measure, report. Run again, it goes on where it was stopped.
#   bash benchmarks/uvcbench_single.sh                                                    the small benchmark and model
#   bash benchmarks/uvcbench_single.sh --bench_dir UVCBench --ckpt_dir models/VDOT --size 480p
#   NPROC=8 bash benchmarks/uvcbench_single.sh --bench_dir UVCBench --ckpt_dir models/VDOT --size 480p --dit_fsdp
# Options go to inference/uvcbench.py (see --help); NPROC is the number of processes.
source "$(dirname "${BASH_SOURCE[0]}")/uvcbench.sh"
run_uvcbench single "$@"
