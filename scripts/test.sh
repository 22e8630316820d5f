#!/usr/bin/env bash
# Everything that must hold: lint, format, types, tests. Makes its own environment; quick the second time.
#   bash scripts/test.sh                 all of it, under ten minutes on two cores
#   bash scripts/test.sh tests/models    only these tests;   -m slow or -m gpu: the long ones, the ones on a GPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env dev train eval
cd "$ROOT"
ruff check .
ruff format --check .
mypy
# Files of tests go to two processes of one thread each: the tests' tensors are too small for more threads.
processes="$(python -c 'import os; print(min(2, os.cpu_count() or 1))')"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -n "${VDOT_TEST_PROCESSES:-$processes}" --dist loadfile "$@"
