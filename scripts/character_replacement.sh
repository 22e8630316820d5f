#!/usr/bin/env bash
# The person of a clip becomes the person of a picture: same movement, same place, someone else.
#   bash scripts/character_replacement.sh clip.mp4 person.png "a knight in silver armour walks through the garden"
#   bash scripts/character_replacement.sh clip.mp4 person.png "..." --bbox 120,60,300,420 --mode bboxtrack,salient
#   bash scripts/character_replacement.sh clip.mp4 person.png "..." --ckpt_dir models/VDOT --offload_model block
#   bash scripts/character_replacement.sh clip.mp4 person.png ""           prepares, and generates nothing
# What is done, by inference/vace_preprocess.py (its --help has every option; all of them go here after the prompt):
#   1. The person is found in the first frame and tracked: by the word "person", or by --mask picture.png (white on the
#      person), --bbox left,top,right,bottom or --label "the woman on the left".
#   2. The mask is a box around the person with room to spare (--maskaug_mode, --maskaug_ratio): an outline would force
#      the new person into the old one's shape.
#   3. Inside it the source shows the pose alone, drawn as DWPose does; outside, the clip. --control none: grey instead.
#   4. The picture is cut out and laid on white. More pictures of the same person, with commas: other sides of them.
#   5. The prompt says who is to be seen and what they do. --context_scale above 1 holds on to the pose more firmly.
# The pose needs a model: `pip install -e ".[annotate]" && pip install --no-deps mediapipe==0.10.21`
# (its models are inside), or --backend vitpose. sam2 among the backends tracks better: --backend mediapipe,sam2
# Look at results/annotate/<time>_character_replacement/preview.png before spending GPU hours.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
recipe character_replacement "$@"
