#!/usr/bin/env bash
# Everything that must hold: lint, format, types, tests. Makes its own environment; quick the second time.
#   bash scripts/test.sh                 all of it, under ten minutes on two cores
#   bash scripts/test.sh tests/models    only these tests;   -m slow or -m gpu: the long ones, the ones on a GPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env dev train eval demo annotate
use_chromium
cd "$ROOT"
ruff check .
ruff format --check .
mypy
# Two threads at most: more only fight over the small tensors of the tests.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" python -m pytest "$@"
