#!/usr/bin/env bash
# From a fresh clone to a video: environment, installation, one generation with the embedded model, no GPU needed.
#   bash scripts/demo.sh                 -> results/demo/out_video.mp4 and results/demo/contact_sheet.png
#   bash scripts/demo.sh "a prompt"      another prompt;   further options go to the generator, see --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env
out="$ROOT/results/demo"
prompt="${1:-A red ball bounces over the grass.}"
[ $# -gt 0 ] && shift
python "$ROOT/inference/vace_wan_inference.py" --prompt "$prompt" --save_dir "$out" "$@"
python "$ROOT/scripts/contact_sheet.py" "$out/out_video.mp4" --out "$out/contact_sheet.png"
