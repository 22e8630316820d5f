#!/usr/bin/env bash
# UVCBench's ten composite tasks (first frame or reference, with a control): generate, measure, report; it resumes.
#   bash benchmarks/uvcbench_composite.sh                                                    the small benchmark and model
#   bash benchmarks/uvcbench_composite.sh --bench_dir UVCBench --ckpt_dir models/VDOT --size 480p
#   NPROC=8 bash benchmarks/uvcbench_composite.sh --bench_dir UVCBench --ckpt_dir models/VDOT --size 480p --dit_fsdp
# Options go to inference/uvcbench.py (see --help); NPROC is the number of processes.
source "$(dirname "${BASH_SOURCE[0]}")/uvcbench.sh"
run_uvcbench composite "$@"
