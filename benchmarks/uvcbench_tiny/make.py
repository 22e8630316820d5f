"""Draw the benchmark in this folder: UVCBench's 18 tasks, 20 samples each, from the procedural world's held-out scenes.

    python benchmarks/uvcbench_tiny/make.py                                  # draws it anew; the files do not change
    python benchmarks/uvcbench_tiny/make.py --truth results/uvcbench/truth   # the right answers, as if generated
    python benchmarks/uvcbench_tiny/make.py --other results/uvcbench/other   # good videos, each of the next sample

Rows name the world's clip as the truth. Scoring the truth gives the best that can be had (what video compression and
the measurements themselves cost), scoring the others what a video gets that ignores everything it was asked for:
``inference/uvcbench.py --bench_dir benchmarks/uvcbench_tiny --score_only --save_dir results/uvcbench/truth``.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vdot.data.sprites import FPS, TaskClip, draw_task
from vdot.data.sprites.scene import SHIPPED
from vdot.evaluate.cases import SETTINGS, UVC, is_composite
from vdot.video import write_image, write_video
from vdot.video.output import atomic_path

HERE = Path(__file__).resolve().parent
SAMPLES = 20
FIRST_SEED = 910_000  # other scenes than training and the in-training benchmark draw
NAMES = {"r2v": "R2V"}  # as published


def world_task(task: str, number: int) -> str:
    """Of the procedural world. Half of the extensions go on from a clip's beginning, half lead to its end."""
    if task == "extension":
        return ("firstclip", "lastclip")[number % 2]
    return task.replace("+", "_")


def draw(task: str, number: int) -> tuple[int, str, TaskClip]:
    seed = FIRST_SEED + 100 * UVC.index(task) + number
    name = world_task(task, number)
    return seed, name, draw_task(seed, name, split="test", view=SHIPPED)


def write(clip: TaskClip, folder: Path, stem: str) -> dict[str, object]:
    """The files of one sample, and how its row names them."""
    names: dict[str, object] = {"src_video": None, "src_mask": None, "src_ref_images": []}
    if clip.src_video is not None:
        names["src_video"] = f"{stem}_src_video.mp4"
        write_video(folder / f"{stem}_src_video.mp4", clip.src_video, FPS)
    if clip.src_mask is not None:
        names["src_mask"] = f"{stem}_src_mask.mp4"
        write_video(folder / f"{stem}_src_mask.mp4", np.repeat(clip.src_mask[..., None], 3, -1), FPS)
    pictures = [f"{stem}_src_ref_image_{i}.png" for i in range(len(clip.references))]
    for name, picture in zip(pictures, clip.references, strict=True):
        write_image(folder / name, picture)
    return names | {"src_ref_images": pictures}


def make(folder: Path, samples: int) -> None:
    for split in ("single", "composite"):
        rows = []
        for task in (t for t in UVC if is_composite(t) == (split == "composite")):
            for number in range(samples):
                seed, name, clip = draw(task, number)
                row = {"subtask": NAMES.get(task, task), "sample_id": f"{number:02d}", "en_prompt": clip.prompt}
                row |= write(clip, folder, f"media/{task.replace('+', '_')}/{number:02d}")
                rows.append(row | {"world": {"task": name, "seed": seed, "view": SHIPPED}})
        with atomic_path(folder / "indices" / f"uvcbench_{split}.txt") as temporary:
            Path(temporary).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    with atomic_path(folder / SETTINGS) as temporary:
        Path(temporary).write_text(json.dumps({"size": "64*64", "frame_num": 17}) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="where to (default: this folder)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each task")
    parser.add_argument("--truth", type=Path, help="write the right answers there, as results, and nothing else")
    parser.add_argument("--other", type=Path, help="the same with each sample's answer to the next one")
    args = parser.parse_args()
    if args.truth is None and args.other is None:
        make(args.out, args.samples)
    for folder, ahead in ((args.truth, 0), (args.other, 1)):
        for task in UVC if folder is not None else ():
            for number in range(args.samples):
                clip = draw(task, (number + ahead) % SAMPLES)[2]
                write_video(folder / NAMES.get(task, task) / f"{number:02d}.mp4", clip.video, FPS)


if __name__ == "__main__":
    main()
