#!/usr/bin/env bash
# One working four-step command per task, on the inputs in assets/examples/<task>/.
#   bash scripts/run_vdot.sh depth                                        the embedded model, no GPU needed
#   bash scripts/run_vdot.sh swap_anything --ckpt_dir models/VDOT --size 480p --offload_model block
#   EXAMPLES=my/inputs bash scripts/run_vdot.sh depth                     your own folder of the same layout
#   bash scripts/run_vdot.sh all --save_dir results/tour                  every task, one after the other
# A task folder holds any of src_video.mp4, src_mask.mp4, src_ref_image_*.png and prompt.txt. Further options go to the
# generator (see --help); --prompt replaces prompt.txt.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
examples="${EXAMPLES:-$ROOT/assets/examples}"
task="${1:-}"
if [ -z "$task" ] || [ "$task" = "--help" ] || [ "$task" = "-h" ]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  echo "tasks: $(cd "$examples" && ls -d */ | tr -d '/' | tr '\n' ' ')"
  exit 0
fi
shift
use_env

run_task() {
  local name="$1" folder="$examples/$1"
  shift
  [ -d "$folder" ] || { echo "error: no task folder $folder; tasks: $(cd "$examples" && ls -d */ | tr -d '/' | tr '\n' ' ')" >&2; exit 2; }
  local args=()
  [ -f "$folder/prompt.txt" ] && args+=(--prompt "$(cat "$folder/prompt.txt")")
  [ -f "$folder/src_video.mp4" ] && args+=(--src_video "$folder/src_video.mp4")
  [ -f "$folder/src_mask.mp4" ] && args+=(--src_mask "$folder/src_mask.mp4")
  local refs
  refs="$(find "$folder" -name 'src_ref_image_*.png' | sort | paste -sd, -)"
  [ -n "$refs" ] && args+=(--src_ref_images "$refs")
  # The schedule (four steps) comes with the checkpoint.
  python "$ROOT/inference/vace_wan_inference.py" "${args[@]}" "$@"
}

if [ "$task" = all ]; then
  table="$(mktemp --suffix=.jsonl)"
  trap 'rm -f "$table"' EXIT
  EXAMPLES="$examples" python - >"$table" <<'PY'
import json, os, pathlib
for folder in sorted(p for p in pathlib.Path(os.environ["EXAMPLES"]).resolve().iterdir() if p.is_dir()):
    row = {"id": folder.name, "prompt": (folder / "prompt.txt").read_text().strip()}
    row |= {key: str(folder / f"{key}.mp4") for key in ("src_video", "src_mask") if (folder / f"{key}.mp4").is_file()}
    references = sorted(map(str, folder.glob("src_ref_image_*.png")))
    print(json.dumps(row | ({"src_ref_images": references} if references else {})))
PY
  python "$ROOT/inference/vace_wan_inference.py" --jobs "$table" --save_dir "$ROOT/results/tour" "$@"
else
  run_task "$task" "$@"
fi
