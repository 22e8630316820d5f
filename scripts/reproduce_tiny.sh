#!/usr/bin/env bash
# The models of the procedural world, from nothing: text encoder, autoencoder, teacher, student, and the ablation's table.
#   bash scripts/reproduce_tiny.sh               everything into results/; stopped anywhere, the same command goes on
#   bash scripts/reproduce_tiny.sh steps=10      key=value for every training (here: a rehearsal of minutes)
#   bash scripts/reproduce_tiny.sh parallel.compute=bfloat16 parallel.compile=true parallel.autocast=true    CPUs with AMX
# Lengths are those of configs/train. By its parts, measured on two CPU cores, twenty-three hours in all
# (benchmarks/RESULTS.md). Seen from far, with AMX: text encoder 13 minutes, autoencoder 62 alone, encoding 40,
# teacher 86; of the ablation 65 for its 24 students, about 115 for sampling and measuring 36 rows of 512 tasks each.
# Seen from near, without AMX: decoder 20 on one core, encoding 44, teacher 227, with finer patches 88; with AMX 15
# for the new clips, 83 for the teacher on them; without, 8 and 41 for newer ones, 20 and 62 for those told more often
# without a source, student 17, single frames 18, teacher on them 13 and on both 56 and 42; the table took 60 of coarse
# patches, that of finer ones was not run as a whole. On a GPU, from steps measured on an H200 and never run as a whole:
# autoencoder at most 15 minutes, encoding 2, teachers at most 20 and 30; the finer patches and the text encoder were not
# tried there.
# CLIPS=N, NEAR_CLIPS=N, WORD_CLIPS=N, GENTLE_CLIPS=N, TOLD_CLIPS=N and STILLS=N change how many clips are encoded,
# SEEDS=N and NEAR_SEEDS=N how often each student of a table is trained, JOBS=N how many processes encode (on GPUs: one
# for each) and how many students are trained at a time (default: cores).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env train eval
cd "$ROOT"
runs="$ROOT/results/train" jobs="${JOBS:-$(nproc)}"
train_as() { # NAME CONFIG key=value...: stopped, a training saves and exits in order; without an export it is not done
    local name="$1"
    shift
    python training/train.py --config "$@" output_dir="$runs/$name"
    [ -d "$runs/$name/export" ] || { echo "$name was stopped before its end: the same command goes on" >&2; exit 130; }
}
train() { train_as "$1" "$@"; }

train tiny_text "$@"
train tiny_vae vae.text_encoder="$runs/tiny_text/export" "$@"
train tiny_decoder ckpt_dir="$runs/tiny_vae/export" vae.text_encoder="$runs/tiny_text/export" "$@"
[ -d "$runs/tiny_start" ] || python scripts/make_tiny.py --encoders "$runs/tiny_decoder/export" --out "$runs/tiny_start"
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
encode() { # FOLDER key=value...
    local out="$1"
    shift
    torchrun --nproc_per_node "$((gpus ? gpus : jobs))" training/encode.py world.seed=2000000 "$@" --ckpt_dir "$runs/tiny_start" --out "$out"
}
encode "$runs/tiny_world" world.clips="${CLIPS:-16384}"
train tiny_teacher "$@"
encode "$runs/tiny_near_world" world.clips="${NEAR_CLIPS:-18432}" world.view=near vae_dtype=bfloat16
train tiny_near ckpt_dir="$runs/tiny_teacher/export" "$@"
[ -d "$runs/tiny_fine_start" ] || python scripts/make_tiny.py --finer "$runs/tiny_near/export" --out "$runs/tiny_fine_start"
train tiny_fine "$@"
# On with new clips, more of them those where nothing but words, references or boxes tells of a thing.
all="$(python -c 'from vdot.data.sprites.tasks import TASKS; print(",".join(TASKS))')"
words="t2v,r2v,r2v_several,layout,swap_anything"
encode "$runs/tiny_words_world" world.clips="${WORD_CLIPS:-9216}" world.seed=2100000 world.tasks="[$all,$words,$words]" \
    world.view=near vae_dtype=bfloat16
train_as tiny_words tiny_fine ckpt_dir="$runs/tiny_fine/export" data.encoded="$runs/tiny_words_world" steps=4000 "$@"
# And again, gently: at 4e-3 a trained teacher first loses what it has. Half of the noise is now below a level of one half.
encode "$runs/tiny_gentle_world" world.clips="${GENTLE_CLIPS:-4368}" world.seed=2300000 \
    world.tasks="[$all,$words,$words]" world.view=near vae_dtype=bfloat16
train_as tiny_gentle tiny_fine ckpt_dir="$runs/tiny_words/export" data.encoded="$runs/tiny_gentle_world" steps=2000 \
    generator.lr=1.5e-3 flow.noise.shift=1 "$@"
train tiny_vdot ckpt_dir="$runs/tiny_gentle/export" "$@"
# The teacher on once more: the student shipped is of the one before. Rows of a task do not make it come
# more often, its weight does: of half the samples here words, references or boxes alone tell.
encode "$runs/tiny_told_world" world.clips="${TOLD_CLIPS:-11340}" world.seed=2600000 \
    world.tasks="[$all,$words,$words]" world.view=near vae_dtype=bfloat16
train_as tiny_told tiny_fine ckpt_dir="$runs/tiny_gentle/export" data.encoded="$runs/tiny_told_world" steps=2900 \
    generator.lr=1.5e-3 flow.noise.shift=2 flow.drop_source=0.4 \
    data.task_weights="{t2v: 2, r2v: 3, r2v_several: 3, layout: 2, swap_anything: 2}" "$@"
# Shapes are learned from many things, not from how they move: single frames, five of which cost what a clip does.
encode "$runs/tiny_stills_world" world.clips="${STILLS:-94464}" world.seed=2500000 world.frames=1 \
    world.tasks="[t2v,r2v,t2v,layout,t2v,r2v_several,r2v,swap_anything]" world.view=near vae_dtype=bfloat16
train_as tiny_stills tiny_fine ckpt_dir="$runs/tiny_told/export" data.encoded="$runs/tiny_stills_world" batch_size=80 \
    steps=700 generator.lr=1.5e-3 flow.noise.shift=2 data.task_weights="{t2v: 3}" "$@"
train_both() { # NAME START key=value...: on clips and single frames
    local name="$1" start="$2"
    shift 2
    train_as "$name" tiny_fine ckpt_dir="$runs/$start/export" data.encoded="$runs/tiny_told_world" flow.noise.shift=2 \
        data.stills.encoded="$runs/tiny_stills_world" data.task_weights="{r2v: 2, r2v_several: 2}" \
        data.stills.task_weights="{t2v: 3, r2v: 2, swap_anything: 0.5}" "$@"
}
train_both tiny_joint tiny_stills data.stills.share=0.75 steps=2800 generator.lr=2.5e-3 flow.drop_source=0.3 "$@"
# Alone the last is better by words and worse by conditions; half way between the two nothing is lost.
[ -d "$runs/tiny_between" ] ||
    python scripts/convert_checkpoint.py "$runs/tiny_told/export" "$runs/tiny_between" --blend "$runs/tiny_joint/export"
# On once more, more clips among the single frames and more of them with their sources. Half way again: models/vace-tiny.
train_both tiny_again tiny_joint data.stills.share=0.6 steps=2000 generator.lr=1.5e-3 flow.drop_source=0.15 "$@"
[ -d "$runs/tiny_middle" ] ||
    python scripts/convert_checkpoint.py "$runs/tiny_between" "$runs/tiny_middle" --blend "$runs/tiny_again/export"
table() { # FOLDER WORLD TEACHER SEEDS options: where the students are trained and measured, on which clips, from whom
    local out="$1" world="$2" teacher="$3" seeds="$4"
    shift 4
    python benchmarks/ablation.py all ckpt_dir="$teacher" data.encoded="$world" "$@" \
        --out "$out" --teacher "$teacher" --seeds "$seeds" --jobs "$jobs"
}
table "$ROOT/results/ablation_near" "$runs/tiny_gentle_world" "$runs/tiny_gentle/export" "${NEAR_SEEDS:-1}" "$@" \
    --view near --variants DMD --model "$runs/tiny_vdot/export"
table "$ROOT/results/ablation" "$runs/tiny_world" "$runs/tiny_teacher/export" "${SEEDS:-3}" \
    steps=160 distill.schedule.shift=3 distill.dmd.guidance=3 "$@" --view far # as it was measured, but for the decoder of then
