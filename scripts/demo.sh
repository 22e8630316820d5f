#!/usr/bin/env bash
# From a fresh clone to videos: environment, installation, one clip per task with the embedded model, no GPU needed.
#   bash scripts/demo.sh                 -> results/demo/gallery.gif, gallery.png and a video per task, in under a minute
#   bash scripts/demo.sh "a prompt"      one video of your own: results/demo/out_video.mp4 and contact_sheet.png;
#                                        further options go to the generator, see --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env
out="$ROOT/results/demo"
if [ $# -eq 0 ]; then
  exec python "$ROOT/scripts/gallery.py" --out "$out"
fi
prompt="$1"
shift
python "$ROOT/inference/vace_wan_inference.py" --prompt "$prompt" --save_dir "$out" "$@"
python "$ROOT/scripts/contact_sheet.py" "$out/out_video.mp4" --out "$out/contact_sheet.png"
