#!/usr/bin/env bash
# The person of a clip wears the garment of a picture.
#   bash scripts/try_on.sh clip.mp4 shirt.png "a man in a red checked shirt waves" --mask shirt_area.png
#   bash scripts/try_on.sh clip.mp4 dress.png "..." --label dress --backend grounding_dino,sam2,mediapipe
#   bash scripts/try_on.sh clip.mp4 shirt.png "..." --mask area.png --control none      without a pose model
#   bash scripts/try_on.sh clip.mp4 shirt.png "" --mask area.png           prepares, and generates nothing
# What is done, by inference/vace_preprocess.py (its --help has every option; all of them go here after the prompt):
#   1. What is worn now is tracked through the clip from --mask picture.png (white on the garment in the first frame),
#      --bbox left,top,right,bottom or --label "blue jacket". A word needs a model that knows it (grounding_dino with
#      sam2, or clipseg); the default word is "shirt".
#   2. The mask is grown a little (--maskaug_mode original_expand, --maskaug_ratio 0.15): loose cloth for tight needs
#      more, a dress for a shirt --maskaug_mode bbox_expand.
#   3. Inside it the source shows the pose alone, so that arms stay where they are; --control none: grey instead.
#   4. The garment is cut out and laid on white. A picture of the garment alone works better than one of it worn.
#   5. The prompt describes person and garment.
# The pose needs a model: `pip install -e ".[annotate]" && pip install --no-deps mediapipe==0.10.21`
# (its models are inside), or --backend vitpose. Look at results/annotate/<time>_try_on/preview.png first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
recipe try_on "$@"
